"""Every pruning method keeps the same contract, and agrees with its naive twin."""

from importlib import import_module
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compression.core.errors import Problem
from compression.pruning import METHODS, wanda
from compression.pruning.method import Pruned, Settings
from compression.pruning.pattern import (
    SCOPES,
    NofM,
    Pattern,
    Scope,
    Unstructured,
    check_width,
    make_pattern,
    parse_pattern,
)
from compression.statistics import InputNorms
from tests.reference import pruning as reference

NAMES = [name for name, module in METHODS.items() if hasattr(import_module(module), "prune")]
MODULES: dict[str, ModuleType] = {name: import_module(METHODS[name]) for name in NAMES}
MASK_ONLY = ["magnitude", "wanda"]  # what stays is not touched
PATTERNS: list[Pattern] = [
    *(Unstructured(sparsity, scope) for sparsity in (0.0, 0.3, 0.5, 0.77, 0.99) for scope in SCOPES),
    *(NofM(keep, of) for keep, of in ((2, 4), (4, 8), (1, 4))),
]
COLUMNS = 10  # a block: neither width nor strip is a multiple


def suits(name: str, pattern: Pattern) -> bool:
    return isinstance(pattern, NofM) or pattern.scope in MODULES[name].SCOPES


# Also by blocks of columns, where the mask may be chosen so.
WAYS = [
    *((name, "layer") for name in NAMES),
    *((name, "columns") for name in NAMES if name in ("magnitude_obs", "wanda_obs")),
]
every_way = pytest.mark.parametrize(("name", "choose"), WAYS)
every_case = pytest.mark.parametrize(
    ("name", "choose", "pattern"),
    [(name, choose, pattern) for name, choose in WAYS for pattern in PATTERNS if suits(name, pattern)],
    ids=str,
)
every_mask_method = pytest.mark.parametrize("name", MASK_ONLY)
every_mask_case = pytest.mark.parametrize(
    ("name", "pattern"),
    [(name, pattern) for name in MASK_ONLY for pattern in PATTERNS if suits(name, pattern)],
    ids=str,
)
every_type = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def prune(
    name: str,
    weight: Tensor,
    inputs: Tensor,
    pattern: Pattern,
    settings: Settings | None = None,
    sizes: list[int] | None = None,
) -> Pruned:
    """Prunes with statistics of inputs [tokens, in] that come in batches of these sizes."""
    method = MODULES[name]
    statistic: Any = None
    if method.STATISTIC is not None:
        statistic = method.STATISTIC(weight.shape[1])
        for part in inputs.split(sizes or [len(inputs)]):
            statistic.update(part)
    done: Pruned = method.prune(weight.clone(), statistic, pattern, settings or Settings(columns=COLUMNS))
    return done


def run(
    name: str, weight: Tensor, inputs: Tensor, pattern: Pattern, settings: Settings | None = None
) -> tuple[Tensor, Tensor]:
    done = prune(name, weight, inputs, pattern, settings)
    return done.weight, done.keep


def example(rows: int = 7, width: int = 24, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    inputs = torch.randn(50, width, generator=draw) * torch.linspace(0.1, 3, width)
    return torch.randn(rows, width, generator=draw).to(dtype), inputs.to(dtype)


def by_columns(name: str, choose: str) -> bool:
    """Is the mask chosen block by block?"""
    return name == "sparsegpt" or choose == "columns"


def assert_counts(keep: Tensor, pattern: Pattern, columns: int | None = None) -> None:
    """The mask drops exactly as many as it has to, where it has to; in each block of columns, if it goes by them."""
    dropped, width = ~keep, keep.shape[1]
    if isinstance(pattern, NofM):
        groups = keep.view(-1, pattern.of).sum(1)
        assert groups.eq(pattern.keep).all()
        return
    total = round(pattern.sparsity * keep.numel())
    assert int(dropped.sum()) == total
    for start in range(0, width, columns or width):
        end = min(start + (columns or width), width)
        block = dropped[:, start:end].sum(1)
        assert int(block.sum()) == total * end // width - total * start // width
        assert pattern.scope != "row" or int(block.max() - block.min()) <= 1


@every_case
@every_type
def test_contract(name: str, choose: str, pattern: Pattern, dtype: torch.dtype) -> None:
    settings = Settings(columns=COLUMNS, choose=choose)
    for rows, width in ((7, 24), (1, 24), (5, 8), (3, 33), (6, 1), (1, 1)):
        if isinstance(pattern, NofM) and width % pattern.of:
            continue
        weight, inputs = example(rows, width, dtype)
        pruned, keep = run(name, weight, inputs, pattern, settings)
        assert keep.dtype == torch.bool
        assert pruned.dtype == weight.dtype
        assert pruned.shape == keep.shape == weight.shape
        assert pruned.is_contiguous()
        assert keep.is_contiguous()
        assert_counts(keep, pattern, COLUMNS if by_columns(name, choose) else None)
        assert torch.equal(pruned != 0, keep)  # no weight of the example is zero
        if name in MASK_ONLY:
            assert torch.equal(pruned[keep], weight[keep])
        again, keep_again = run(name, weight, inputs, pattern, settings)
        assert torch.equal(pruned, again)
        assert torch.equal(keep, keep_again)


def test_ways_differ() -> None:
    """What is tested above under several names is not one method."""
    weight, inputs = example()
    masks = []
    for name, choose in WAYS:
        pattern = Unstructured(0.5, MODULES[name].SCOPES[0])
        masks.append(run(name, weight, inputs, pattern, Settings(columns=COLUMNS, choose=choose))[0])
    assert len({tuple(pruned.flatten().tolist()) for pruned in masks}) == len(WAYS)


@every_way
@pytest.mark.parametrize("pattern", [Unstructured(0.5), NofM(2, 4)], ids=str)
@every_type
def test_the_split_into_batches_does_not_matter(name: str, choose: str, pattern: Pattern, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(4)
    weight, inputs = example(dtype=dtype)
    inputs = torch.randn(2500, 24, generator=draw).to(dtype) * inputs[0].abs()  # several chunks of Gram
    if isinstance(pattern, Unstructured):
        pattern = Unstructured(0.5, MODULES[name].SCOPES[0])
    settings = Settings(columns=COLUMNS, choose=choose)
    whole = prune(name, weight, inputs, pattern, settings)
    for sizes in ([100] * 25, [1023, 1, 2, 1474], [1, 2499], [1100, 1400]):
        split = prune(name, weight, inputs, pattern, settings, sizes)
        assert torch.equal(split.weight, whole.weight)
        assert torch.equal(split.keep, whole.keep)
        assert split.notes == whole.notes


@every_way
@pytest.mark.parametrize("rows", [1, 7])
def test_nothing_that_came_in_is_written_to(name: str, choose: str, rows: int) -> None:
    weight, inputs = example(rows)
    given, method = weight.clone(), MODULES[name]
    statistic: Any = None
    if method.STATISTIC is not None:
        statistic = method.STATISTIC(24)
        statistic.update(inputs)
    norms = statistic.norms().clone() if statistic else torch.empty(0)
    pattern = Unstructured(0.5, method.SCOPES[0])
    first = method.prune(given, statistic, pattern, Settings(columns=COLUMNS, choose=choose))
    assert torch.equal(given, weight)
    assert statistic is None or torch.equal(statistic.norms(), norms)
    # Layers that share an input share the statistic.
    second = method.prune(given, statistic, pattern, Settings(columns=COLUMNS, choose=choose))
    assert torch.equal(first.weight, second.weight)


@pytest.mark.parametrize(("name", "choose"), [way for way in WAYS if way[0] != "magnitude"])  # looks at no input
@pytest.mark.parametrize("size", [0.03, 1.0, 30.0])
@pytest.mark.parametrize("pattern", [Unstructured(0.5), NofM(2, 4)], ids=str)
def test_dead_inputs_cost_no_weight(name: str, choose: str, pattern: Pattern, size: float) -> None:
    """A third of the inputs is zero on every token: their weights go first, whatever their and the others' size."""
    weight, inputs = example()
    dead = torch.arange(24) % 3 == 0
    weight[:, dead] *= 100
    inputs = inputs * size
    inputs[:, dead] = 0
    if isinstance(pattern, Unstructured):
        pattern = Unstructured(0.5, MODULES[name].SCOPES[0])
    settings = Settings(columns=COLUMNS, choose=choose)
    done = prune(name, weight, inputs, pattern, settings)
    assert done.weight.isfinite().all()
    assert (done.weight[:, dead] == 0).all()
    assert_counts(done.keep, pattern, COLUMNS if by_columns(name, choose) else None)
    if name != "magnitude_obs":  # its mask looks at no input
        assert not done.keep[:, dead].any()


@every_way
@pytest.mark.parametrize("pattern", [Unstructured(0.5), NofM(2, 4)], ids=str)
def test_a_layer_that_sees_nothing_but_zeros(name: str, choose: str, pattern: Pattern) -> None:
    weight, inputs = example()
    if isinstance(pattern, Unstructured):
        pattern = Unstructured(0.5, MODULES[name].SCOPES[0])
    done = prune(name, weight, inputs * 0, pattern, Settings(columns=COLUMNS, choose=choose))
    assert done.weight.isfinite().all()
    assert_counts(done.keep, pattern, COLUMNS if by_columns(name, choose) else None)
    assert done.notes.get("error", 0) == 0


@every_way
def test_a_layer_of_zeros_stays_one(name: str, choose: str) -> None:
    weight, inputs = example()
    pattern = Unstructured(0.5, MODULES[name].SCOPES[0])
    done = prune(name, weight * 0, inputs, pattern, Settings(columns=COLUMNS, choose=choose))
    assert (done.weight == 0).all()
    assert_counts(done.keep, pattern, COLUMNS if by_columns(name, choose) else None)
    assert done.notes.get("error", 0) == 0


@every_way
@every_type
def test_nothing_dropped_nothing_changed(name: str, choose: str, dtype: torch.dtype) -> None:
    weight, inputs = example(dtype=dtype)
    pattern = Unstructured(0.0, MODULES[name].SCOPES[0])
    pruned, keep = run(name, weight, inputs, pattern, Settings(columns=COLUMNS, choose=choose))
    assert keep.all()
    torch.testing.assert_close(pruned, weight)


@every_mask_case
@every_type
def test_equals_naive_twin(name: str, pattern: Pattern, dtype: torch.dtype) -> None:
    weight, inputs = example(dtype=dtype)
    if dtype == torch.bfloat16:
        inputs = inputs.round()  # norms exact, or equal scores may be told apart by rounding
    _, keep = run(name, weight, inputs, pattern)
    assert torch.equal(keep, reference.METHODS[name](weight, inputs, pattern))


@every_mask_method
@given(data=st.data())
@settings(deadline=None, max_examples=40)
def test_equals_naive_twin_on_any_small_case(name: str, data: st.DataObject) -> None:
    """Small whole numbers: many ties, zeros and dead inputs, and scores without rounding."""
    rows, groups = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3))
    of = data.draw(st.integers(2, 6))
    width = groups * of
    pattern: Pattern = data.draw(
        st.one_of(
            st.builds(Unstructured, st.floats(0, 0.99), st.sampled_from(MODULES[name].SCOPES)),
            st.builds(NofM, st.integers(1, of - 1), st.just(of)),
        )
    )
    numbers = st.integers(-3, 3)
    weight = torch.tensor(data.draw(st.lists(numbers, min_size=rows * width, max_size=rows * width))).float()
    inputs = torch.diag(torch.tensor(data.draw(st.lists(numbers, min_size=width, max_size=width))).float())
    weight = weight.view(rows, width)
    pruned, keep = run(name, weight, inputs, pattern)
    assert torch.equal(keep, reference.METHODS[name](weight, inputs, pattern))
    assert torch.equal(pruned, weight * keep)
    assert_counts(keep, pattern)


@every_mask_case
def test_equal_weights_drop_the_earlier_input(name: str, pattern: Pattern) -> None:
    weight, inputs = torch.full((4, 16), -0.5), torch.ones(3, 16)
    _, keep = run(name, weight, inputs, pattern)
    assert_counts(keep, pattern)
    rows = keep.view(-1, pattern.of) if isinstance(pattern, NofM) else keep
    if isinstance(pattern, Unstructured) and pattern.scope == "layer":
        rows = keep.view(1, -1)
    assert all(row == sorted(row) for row in rows.int().tolist())  # first the dropped ones, then the kept ones


def test_wanda_drops_dead_inputs_first() -> None:
    weight, inputs = example()
    dead = torch.arange(24) % 3 == 0
    weight[:, dead] *= 100
    inputs[:, dead] = 0
    _, keep = run("wanda", weight, inputs, Unstructured(0.5))
    assert not keep[:, dead].any()
    _, keep = run("magnitude", weight, inputs, Unstructured(0.5))
    assert keep[:, dead].all()


def test_wanda_looks_at_inputs_and_magnitude_does_not() -> None:
    weight, inputs = torch.ones(1, 4), torch.tensor([[4.0, 1.0, 3.0, 2.0]])
    assert run("wanda", weight, inputs, Unstructured(0.5))[1].tolist() == [[True, False, True, False]]
    assert run("magnitude", weight, inputs, Unstructured(0.5))[1].tolist() == [[False, False, True, True]]


def test_scope_layer_compares_rows_with_each_other() -> None:
    weight = torch.cat([torch.full((1, 8), 0.1), torch.full((1, 8), 5.0)])
    _, keep = run("magnitude", weight, torch.ones(1, 8), Unstructured(0.5, scope="layer"))
    assert keep.sum(1).tolist() == [0, 8]
    _, keep = run("magnitude", weight, torch.ones(1, 8), Unstructured(0.5, scope="row"))
    assert keep.sum(1).tolist() == [4, 4]


def test_a_rest_is_spread_over_the_rows() -> None:
    _, keep = run("magnitude", torch.rand(10, 33) + 1, torch.ones(1, 33), Unstructured(0.5))
    assert (~keep).sum(1).tolist() == reference.row_counts(10, 33, 0.5)
    assert int((~keep).sum()) == 165


@pytest.mark.parametrize("sparsity", [0.0, 0.2, 0.5, 0.77, 0.95])
def test_scope_adaptive_takes_the_same_share_of_every_rows_scores(sparsity: float) -> None:
    """Against Wanda's own way to it: bisection for the share alpha."""
    weight, inputs = example(9, 40)
    weight *= torch.logspace(-1, 1, 9)[:, None] * torch.rand(9, 40, generator=torch.Generator().manual_seed(1)).pow(
        torch.linspace(0, 3, 9)[:, None]
    )  # rows of several sizes, and with more or fewer small weights
    pattern = Unstructured(sparsity, "adaptive")
    _, keep = run("wanda", weight, inputs, pattern)
    assert_counts(keep, pattern)
    score = wanda.score(weight, summed_up(inputs))
    assert torch.equal(keep, reference.adaptive_by_bisection(score, round(sparsity * 360)))
    shares = reference.cumulated_shares(score)
    dropped, kept = shares[~keep], shares[keep]
    assert not len(dropped) or float(dropped.max()) <= float(kept.min())
    rows = (~keep).sum(1)
    assert sparsity == 0 or int(rows.max() - rows.min()) > 1  # or it were scope `row`
    _, scaled = run("wanda", weight * torch.logspace(-3, 3, 9)[:, None], inputs, pattern)
    assert torch.equal(scaled, keep) or int((scaled ^ keep).sum()) <= 2  # a row's size does not matter


def summed_up(inputs: Tensor) -> InputNorms:
    statistic = InputNorms(inputs.shape[1])
    statistic.update(inputs)
    return statistic


def test_scope_adaptive_drops_a_row_of_zeros_first() -> None:
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0]])
    _, keep = run("wanda", weight, torch.ones(3, 4), Unstructured(0.5, "adaptive"))
    assert keep.tolist() == [[True] * 4, [False] * 4]


@pytest.mark.parametrize("scope", ["row", "layer"])
def test_what_an_earlier_cycle_dropped_stays_dropped(scope: Scope) -> None:
    """Also where a weight that stayed has come to be zero, or one that went has come back."""
    weight, _ = example(6, 40)
    before = run("magnitude", weight, weight, Unstructured(0.3, scope))[1]
    later = torch.randn(6, 40, generator=torch.Generator().manual_seed(9)) * before
    zeroed = before & (torch.rand(6, 40, generator=torch.Generator().manual_seed(2)) < 0.2)
    later[zeroed] = 0
    later[~before] = torch.linspace(0, 100, int((~before).sum()))
    for sparsity in (0.3, 0.36, 0.5):
        pattern = Unstructured(sparsity, scope)
        pruned, keep = run("magnitude", later, later, pattern, Settings(before=before))
        assert_counts(keep, pattern)
        assert not (keep & ~before).any()
        assert (pruned[~before] == 0).all()
        assert torch.equal(pruned, later * keep)
    assert keep[zeroed].sum() < zeroed.sum()  # among those that stayed, the smallest go
    _, untold = run("magnitude", later, later, Unstructured(0.3, scope), Settings())
    assert (untold & ~before).any()  # it is `before` that held them down


def test_a_pattern_that_asks_for_less_than_an_earlier_cycle_gives_nothing_back() -> None:
    weight, _ = example(6, 40)
    before = run("magnitude", weight, weight, Unstructured(0.5))[1]
    pruned, keep = run("magnitude", weight, weight, Unstructured(0.3), Settings(before=before))
    assert torch.equal(keep, before)
    assert torch.equal(pruned, weight * before)


def test_cycles_hold_in_groups_as_well() -> None:
    weight, _ = example(6, 40)
    before = run("magnitude", weight, weight, NofM(6, 8))[1]
    keep = run("magnitude", weight.flip(1), weight, NofM(4, 8), Settings(before=before))[1]
    assert_counts(keep, NofM(4, 8))
    assert not (keep & ~before).any()


@pytest.mark.parametrize("text", ["2:2", "0:4", "4:2", "2/4", "", "structured", "2:4:8"])
def test_nonsense_patterns_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="valid: unstructured; N:M"):
        parse_pattern(text)


def test_pattern_and_sparsity_have_to_agree() -> None:
    assert make_pattern("1:4", 0.75, "row") == NofM(1, 4)
    assert make_pattern("unstructured", 0.3, "layer") == Unstructured(0.3, "layer")
    with pytest.raises(Problem, match=r"0\.5 contradicts the pattern 1:4\n.*0\.75"):
        make_pattern("1:4", 0.5, "row")


def test_width_that_cannot_be_divided_is_named() -> None:
    check_width(NofM(2, 4), "block.up", 64)
    with pytest.raises(Problem, match=r"block\.up: 66 inputs cannot be divided into groups of 4 \(2:4\)"):
        check_width(NofM(2, 4), "block.up", 66)
