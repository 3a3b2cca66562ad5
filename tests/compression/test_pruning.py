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
from compression.pruning import METHODS
from compression.pruning.method import Settings
from compression.pruning.pattern import NofM, Pattern, Unstructured, check_width, make_pattern, parse_pattern
from tests.reference import pruning as reference

NAMES = [name for name in METHODS if name != "none"]
PATTERNS: list[Pattern] = [
    *(Unstructured(sparsity, scope) for sparsity in (0.0, 0.3, 0.5, 0.77) for scope in ("row", "layer")),
    *(NofM(keep, of) for keep, of in ((2, 4), (4, 8), (1, 4))),
]
every_method = pytest.mark.parametrize("name", NAMES)
MASK_ONLY = ["magnitude", "wanda"]  # what stays is not touched
every_mask_method = pytest.mark.parametrize("name", MASK_ONLY)
every_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=str)


def run(
    name: str, weight: Tensor, inputs: Tensor, pattern: Pattern, settings: Settings | None = None
) -> tuple[Tensor, Tensor]:
    """Prunes with statistics of inputs [tokens, in]."""
    method: ModuleType = import_module(METHODS[name])
    statistic: Any = None
    if method.STATISTIC is not None:
        statistic = method.STATISTIC(weight.shape[1])
        statistic.update(inputs)
    done = method.prune(weight.clone(), statistic, pattern, settings or Settings())
    return done.weight, done.keep


def example(rows: int = 7, width: int = 24, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    inputs = torch.randn(50, width, generator=draw) * torch.linspace(0.1, 3, width)
    return torch.randn(rows, width, generator=draw).to(dtype), inputs.to(dtype)


def assert_counts(keep: Tensor, pattern: Pattern) -> None:
    """The mask drops exactly as many as it has to, where it has to."""
    dropped = ~keep
    if isinstance(pattern, NofM):
        groups = keep.view(-1, pattern.of).sum(1)
        assert groups.eq(pattern.keep).all()
        return
    assert int(dropped.sum()) == round(pattern.sparsity * keep.numel())
    if pattern.scope == "row":
        rows = dropped.sum(1)
        assert int(rows.max() - rows.min()) <= 1


@every_method
@every_pattern
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_contract(name: str, pattern: Pattern, dtype: torch.dtype) -> None:
    weight, inputs = example(dtype=dtype)
    pruned, keep = run(name, weight, inputs, pattern)
    assert keep.dtype == torch.bool
    assert pruned.dtype == weight.dtype
    assert pruned.shape == keep.shape == weight.shape
    assert_counts(keep, pattern)
    assert torch.equal(pruned != 0, keep)  # no weight of the example is zero
    if name in MASK_ONLY:
        assert torch.equal(pruned[keep], weight[keep])
    again, keep_again = run(name, weight, inputs, pattern)
    assert torch.equal(pruned, again)
    assert torch.equal(keep, keep_again)


@every_mask_method
@every_pattern
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
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
            st.builds(Unstructured, st.floats(0, 0.99), st.sampled_from(["row", "layer"])),
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


@every_mask_method
@every_pattern
def test_equal_weights_drop_the_earlier_input(name: str, pattern: Pattern) -> None:
    weight, inputs = torch.full((4, 16), -0.5), torch.ones(3, 16)
    _, keep = run(name, weight, inputs, pattern)
    assert_counts(keep, pattern)
    rows = keep.view(-1, pattern.of) if isinstance(pattern, NofM) else keep
    if isinstance(pattern, Unstructured) and pattern.scope != "row":
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


@pytest.mark.parametrize("text", ["2:2", "0:4", "4:2", "2/4", "", "structured", "2:4:8"])
def test_nonsense_patterns_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="valid: unstructured, or N:M"):
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
