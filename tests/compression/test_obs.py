"""Methods that make up for what they drop: masks and weights of their float64 twins, and less error for it."""

from dataclasses import replace
from itertools import combinations
from types import ModuleType

import pytest
import torch
from torch import Tensor

from compression.core.errors import Problem
from compression.pruning import alps, magnitude, magnitude_obs, obs, sparsegpt, wanda, wanda_obs
from compression.pruning.method import Pruned, Settings
from compression.pruning.pattern import NofM, Pattern, Unstructured
from compression.pruning.select import keep_highest
from compression.quantization import rtn
from compression.quantization.method import Settings as GridSettings
from compression.statistics import Gram, InputNorms
from tests.reference import obs as reference
from tests.reference.pruning import row_counts

SHAPES = [  # rows, inputs, columns a block, columns a strip
    (5, 24, 8, 4),
    (1, 24, 24, 16),
    (6, 33, 7, 3),
    (4, 37, 128, 16),
    (3, 40, 10, 16),
    (2, 5, 1, 16),
]
GROUPS = [(5, 24, 8, 4), (1, 24, 128, 16), (4, 40, 10, 3), (3, 8, 8, 16)]
every_group = pytest.mark.parametrize("group", [(2, 4), (4, 8), (1, 4)], ids=["2:4", "4:8", "1:4"])
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_choice = pytest.mark.parametrize("choose", ["layer", "columns"])
HALF = Unstructured(0.5, "columns")


def example(rows: int, width: int, tokens: int = 120) -> tuple[Tensor, Tensor]:
    """Weights, and inputs [tokens, in] that hang together: every update matters."""
    draw = torch.Generator().manual_seed(100 * rows + width)
    mixing = torch.eye(width) + 0.4 * torch.randn(width, width, generator=draw)
    inputs = torch.randn(tokens, width, generator=draw) @ mixing * torch.linspace(0.3, 2, width)
    return torch.randn(rows, width, generator=draw), inputs


def gram(inputs: Tensor) -> Gram:
    summed = Gram(inputs.shape[1])
    summed.update(inputs)
    return summed


def norms(inputs: Tensor) -> InputNorms:
    summed = InputNorms(inputs.shape[1])
    summed.update(inputs)
    return summed


def assert_close(weight: Tensor, exact: Tensor) -> None:
    """To a thousandth of the row's largest weight."""
    assert float(((weight.double() - exact).abs() / exact.abs().amax(1, keepdim=True).clamp(min=1e-3)).max()) < 1e-3


def assert_equals_twin(done: Pruned, twin: tuple[Tensor, Tensor]) -> None:
    weight, keep = twin
    assert torch.equal(done.keep, keep)
    assert_close(done.weight, weight)


@pytest.mark.parametrize("width", [1, 2, 5, 10])
def test_a_row_is_the_best_there_is_given_the_columns_before(width: int) -> None:
    """Against least squares, column by column: the OBS formula is on one side only."""
    weight, inputs = example(4, width)
    for name, method in (("magnitude", magnitude_obs), ("wanda", wanda_obs)):
        done = method.prune(weight.clone(), gram(inputs), Unstructured(0.4, "row"), Settings())
        H = reference.hessian(inputs, 0.01)
        exact = torch.stack([reference.surgery(row, H, keep) for row, keep in zip(weight, done.keep, strict=True)])
        assert_close(done.weight, exact)
        twin, _ = reference.sweep(weight, inputs, Unstructured(0.4), "magnitude", done.keep)
        torch.testing.assert_close(twin, exact), name  # and the twins are one


@every_shape
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.8, 0.99])
def test_sparsegpt_equals_its_twin(
    sparsity: float, shape: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, width, columns, strip = shape
    monkeypatch.setattr(obs, "STRIP", strip)
    weight, inputs = example(rows, width)
    pattern = Unstructured(sparsity, "columns")
    done = sparsegpt.prune(weight.clone(), gram(inputs), pattern, Settings(columns=columns))
    assert_equals_twin(done, reference.sweep(weight, inputs, pattern, columns=columns))


@pytest.mark.parametrize("shape", GROUPS, ids=str)
@every_group
def test_sparsegpt_equals_its_twin_in_groups(
    group: tuple[int, int], shape: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, width, columns, strip = shape
    monkeypatch.setattr(obs, "STRIP", strip)
    weight, inputs = example(rows, width)
    done = sparsegpt.prune(weight.clone(), gram(inputs), NofM(*group), Settings(columns=columns))
    assert_equals_twin(done, reference.sweep(weight, inputs, NofM(*group)))


@pytest.mark.parametrize("columns", [4, 5, 7, 128])
@pytest.mark.parametrize("strip", [1, 4, 16])
def test_groups_that_fit_neither_strip_nor_block(columns: int, strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(obs, "STRIP", strip)
    weight, inputs = example(4, 35)
    done = sparsegpt.prune(weight.clone(), gram(inputs), NofM(3, 5), Settings(columns=columns))
    assert_equals_twin(done, reference.sweep(weight, inputs, NofM(3, 5)))


@every_choice
@every_shape
@pytest.mark.parametrize("scope", ["row", "layer"])
def test_borrowed_masks_equal_their_twins(
    scope: str, shape: tuple[int, int, int, int], choose: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, width, columns, strip = shape
    monkeypatch.setattr(obs, "STRIP", strip)
    weight, inputs = example(rows, width)
    pattern = Unstructured(0.5, scope)  # type: ignore[arg-type]
    settings = Settings(columns=columns, choose=choose)
    for score, method, plain in (("magnitude", magnitude_obs, magnitude), ("wanda", wanda_obs, wanda)):
        keep = None
        if choose == "layer":
            keep = plain.prune(weight.clone(), norms(inputs), pattern, Settings()).keep
        done = method.prune(weight.clone(), gram(inputs), pattern, settings)
        twin = reference.sweep(weight, inputs, pattern, score, keep, columns=columns)  # type: ignore[arg-type]
        assert_equals_twin(done, twin)


@every_choice
@every_group
def test_borrowed_masks_equal_their_twins_in_groups(group: tuple[int, int], choose: str) -> None:
    weight, inputs = example(5, 24)
    pattern = NofM(*group)
    for score, method, plain in (("magnitude", magnitude_obs, magnitude), ("wanda", wanda_obs, wanda)):
        keep = None
        if choose == "layer":
            keep = plain.prune(weight.clone(), norms(inputs), pattern, Settings()).keep
        done = method.prune(weight.clone(), gram(inputs), pattern, Settings(choose=choose))
        assert_equals_twin(done, reference.sweep(weight, inputs, pattern, score, keep))  # type: ignore[arg-type]


@pytest.mark.parametrize("damping", [0.0001, 0.1, 1.0])
def test_damping_is_that_of_the_twin(damping: float) -> None:
    weight, inputs = example(5, 24)
    done = sparsegpt.prune(weight.clone(), gram(inputs), HALF, Settings(damping=damping))
    assert done.notes["damping"] == damping
    assert_equals_twin(done, reference.sweep(weight, inputs, HALF, damping=damping))


def test_dead_inputs_go_first_and_the_rest_equals_the_twin() -> None:
    weight, inputs = example(5, 24)
    dead = torch.arange(24) % 4 == 1
    inputs[:, dead] = 0
    weight[:, dead] *= 100
    done = sparsegpt.prune(weight.clone(), gram(inputs), HALF, Settings(columns=8))
    assert not done.keep[:, dead].any()
    assert_equals_twin(done, reference.sweep(weight, inputs, HALF, columns=8))


def test_inputs_that_do_not_hang_together_make_sparsegpt_wanda() -> None:
    """H diagonal: nothing can be made up for, and the cost of a weight is Wanda's score squared."""
    draw = torch.Generator().manual_seed(5)
    weight, inputs = torch.randn(6, 24, generator=draw), torch.diag(torch.rand(24, generator=draw) + 0.5)
    few = Settings(damping=1e-7, columns=8)
    for pattern in (NofM(2, 4), NofM(3, 8)):
        ours = sparsegpt.prune(weight.clone(), gram(inputs), pattern, few)
        theirs = wanda.prune(weight.clone(), norms(inputs), pattern, Settings())
        assert torch.equal(ours.keep, theirs.keep)
        torch.testing.assert_close(ours.weight, theirs.weight)
    ours = sparsegpt.prune(weight.clone(), gram(inputs), HALF, few)
    for part in range(0, 24, 8):
        block = slice(part, part + 8)
        theirs = wanda.prune(weight[:, block], norms(inputs[:, block]), Unstructured(0.5, "layer"), Settings())
        assert torch.equal(ours.keep[:, block], theirs.keep)
    whole = sparsegpt.prune(weight.clone(), gram(inputs), HALF, replace(few, columns=24))
    theirs = wanda.prune(weight.clone(), norms(inputs), Unstructured(0.5, "layer"), Settings())
    assert torch.equal(whole.keep, theirs.keep)


@pytest.mark.parametrize("pattern", [Unstructured(0.5, "row"), Unstructured(0.7, "layer"), NofM(2, 4)], ids=str)
def test_making_up_for_losses_loses_less(pattern: Pattern) -> None:
    weight, inputs = example(16, 48, tokens=400)
    summed = gram(inputs)

    def error(changed: Tensor) -> float:
        return reference.layer_error(weight, changed, inputs)

    spare = sparsegpt.prune(weight.clone(), summed, pattern, Settings(columns=16))
    assert error(spare.weight) < error(weight * spare.keep)
    plain = wanda.prune(weight.clone(), norms(inputs), pattern, Settings())
    updated = wanda_obs.prune(weight.clone(), summed, pattern, Settings())
    assert torch.equal(plain.keep, updated.keep)
    assert error(updated.weight) < error(plain.weight)
    plain = magnitude.prune(weight.clone(), None, pattern, Settings())
    updated = magnitude_obs.prune(weight.clone(), summed, pattern, Settings())
    assert torch.equal(plain.keep, updated.keep)
    assert error(updated.weight) < error(plain.weight)
    assert error(alps.prune(weight.clone(), summed, pattern, Settings()).weight) < error(spare.weight)


@pytest.mark.parametrize("method", [magnitude_obs, wanda_obs])
def test_choosing_in_blocks_gives_another_mask_of_the_same_size(method: ModuleType) -> None:
    weight, inputs = example(6, 32)
    for pattern in (Unstructured(0.5, "row"), Unstructured(0.3, "layer"), NofM(2, 4)):
        first, later = (
            method.prune(weight.clone(), gram(inputs), pattern, Settings(columns=8, choose=choose))
            for choose in ("layer", "columns")
        )
        assert not torch.equal(first.keep, later.keep)
        assert first.keep.sum() == later.keep.sum()


@pytest.mark.parametrize("method", [sparsegpt, magnitude_obs, wanda_obs])
@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("damping", [1e-4, 0.01, 0.3])
def test_noted_error_is_what_the_sweep_minimises(
    damping: float, bits: int | None, rows: int, method: ModuleType
) -> None:
    """The damped loss by the output of the dense layer: with little damping, the share of the output that is lost."""
    weight, inputs = example(rows, 24)
    settings = Settings(damping=damping, columns=8 if bits else 10, bits=bits, group_size=8)
    done = method.prune(weight.clone(), gram(inputs), Unstructured(0.5, "layer"), settings)
    whole = float((inputs.double() @ weight.double().T).square().sum()) / len(inputs)
    lost = reference.objective(weight, done.weight, reference.hessian(inputs, damping))
    assert done.notes["error"] == pytest.approx(lost / whole, rel=1e-3)
    if damping == 1e-4:
        assert done.notes["error"] == pytest.approx(reference.layer_error(weight, done.weight, inputs), rel=5e-3)


def test_noted_error_does_not_count_dead_inputs() -> None:
    weight, inputs = example(6, 24)
    inputs[:, ::3] = 0
    done = sparsegpt.prune(weight.clone(), gram(inputs), HALF, Settings(damping=1e-5))
    assert done.notes["error"] == pytest.approx(reference.layer_error(weight, done.weight, inputs), rel=5e-3)


@pytest.mark.parametrize("rows", [1, 6])
def test_alps_notes_the_share_of_the_output_that_is_lost(rows: int) -> None:
    weight, inputs = example(rows, 24)
    for dtype in (torch.float32, torch.bfloat16):
        stored = weight.to(dtype)
        done = alps.prune(stored.clone(), gram(inputs), Unstructured(0.5, "layer"), Settings())
        assert done.notes["error"] == pytest.approx(reference.layer_error(stored, done.weight, inputs), rel=1e-3)


@pytest.mark.parametrize("method", [sparsegpt, magnitude_obs, wanda_obs, alps])
def test_inputs_that_are_all_one_still_give_weights(method: ModuleType) -> None:
    """H of rank one, and almost no damping asked for."""
    weight, _ = example(6, 24)
    inputs = torch.linspace(0.5, 2, 24).repeat(30, 1)
    done = method.prune(weight.clone(), gram(inputs), Unstructured(0.5, "layer"), Settings(damping=1e-12))
    assert done.weight.isfinite().all()
    assert int(done.keep.sum()) == 72
    assert done.notes["error"] < 0.05  # one number a row is all that has to come out right
    if method is not alps:
        assert done.notes["damping"] > 1e-12


# Refitting what stays


@pytest.mark.parametrize("method", [sparsegpt, magnitude_obs, wanda_obs])
@pytest.mark.parametrize("pattern", [Unstructured(0.6, "columns"), NofM(2, 4)], ids=str)
@pytest.mark.parametrize("rows", [1, 6])
def test_refit_keeps_the_mask_and_ends_at_the_best_weights_on_it(
    rows: int, pattern: Pattern, method: ModuleType
) -> None:
    weight, inputs = example(rows, 24)
    inputs[:, 5] = 0
    H = reference.hessian(inputs, 0.01)
    swept = method.prune(weight.clone(), gram(inputs), pattern, Settings(columns=8))
    lost = [reference.objective(weight, swept.weight, H)]
    for steps in (1, 2, 4, 40):
        done = method.prune(weight.clone(), gram(inputs), pattern, Settings(columns=8, refit=steps))
        assert torch.equal(done.keep, swept.keep)
        assert not done.weight[~done.keep].any()
        lost.append(reference.objective(weight, done.weight, H))
    alive = weight.clone()
    alive[:, 5] = 0  # nothing came by that could tell what it is worth
    least = reference.objective(weight, reference.refit(alive, H, swept.keep), H)
    assert lost == sorted(lost, reverse=True)
    assert lost[0] > 1.02 * least
    assert lost[-1] == pytest.approx(least, rel=1e-4)
    whole = float((inputs.double() @ weight.double().T).square().sum()) / len(inputs)
    assert done.notes["error"] == pytest.approx(reference.objective(alive, done.weight, H) / whole, rel=1e-3)


@pytest.mark.parametrize("pattern", [Unstructured(0.6, "columns"), NofM(2, 4)], ids=str)
def test_refit_in_bfloat16_gains_as_much(pattern: Pattern, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, inputs = example(16, 48, tokens=400)
    stored, H = weight.bfloat16(), reference.hessian(inputs, 0.01)
    lost = {}
    for computing in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(obs, "pick_dtype", lambda *_, computing=computing: computing)
        done = sparsegpt.prune(stored.clone(), gram(inputs), pattern, Settings(columns=16, refit=5))
        lost[computing] = reference.objective(stored, done.weight, H)
    swept = sparsegpt.prune(stored.clone(), gram(inputs), pattern, Settings(columns=16))
    gain = reference.objective(stored, swept.weight, H) - lost[torch.float32]
    assert gain > 0.05 * lost[torch.float32]
    assert abs(lost[torch.bfloat16] - lost[torch.float32]) < 0.02 * gain


def test_what_lies_on_a_grid_is_not_refitted() -> None:
    weight, inputs = example(6, 24)
    settings = Settings(columns=8, bits=4, group_size=8)
    plain = sparsegpt.prune(weight.clone(), gram(inputs), HALF, settings)
    asked = sparsegpt.prune(weight.clone(), gram(inputs), HALF, replace(settings, refit=5))
    assert torch.equal(plain.weight, asked.weight)


# ALPS

FITTED = Settings(refit=20)
ALPS_PATTERNS: list[Pattern] = [
    Unstructured(0.5, "layer"),
    Unstructured(0.8, "layer"),
    Unstructured(0.6, "row"),
    NofM(2, 4),
]
every_alps_pattern = pytest.mark.parametrize("pattern", ALPS_PATTERNS, ids=str)


@every_alps_pattern
@pytest.mark.parametrize("shape", [(1, 16), (6, 24), (16, 48)], ids=str)
def test_alps_refits_the_kept_weights(shape: tuple[int, int], pattern: Pattern) -> None:
    weight, inputs = example(*shape)
    done = alps.prune(weight.clone(), gram(inputs), pattern, FITTED)
    H = reference.hessian(inputs, 0.01)
    best = reference.refit(weight, H, done.keep)
    lost, least = (reference.objective(weight, changed, H) for changed in (done.weight, best))
    assert least * (1 - 1e-4) <= lost <= 1.01 * least


@every_alps_pattern
@pytest.mark.parametrize("shape", [(1, 16), (6, 24), (16, 48)], ids=str)
def test_alps_finds_the_mask_of_its_twin(shape: tuple[int, int], pattern: Pattern) -> None:
    """Float32 may take another turn where two weights come close; it does not lose by it."""
    weight, inputs = example(*shape)
    done = alps.prune(weight.clone(), gram(inputs), pattern, FITTED)
    exact, keep = reference.alps(weight, inputs, pattern)
    assert int((done.keep ^ keep).sum()) <= 0.02 * keep.numel()
    H = reference.hessian(inputs, 0.01)
    assert reference.objective(weight, done.weight, H) == pytest.approx(reference.objective(weight, exact, H), rel=0.02)


def test_alps_comes_close_to_the_best_mask_there_is() -> None:
    """70 masks a row can be tried one by one."""
    weight, inputs = example(20, 8)
    H = reference.hessian(inputs, 0.01)
    best = 0.0
    for row in weight:
        keeps = torch.zeros(70, 8, dtype=torch.bool)
        for keep, kept in zip(keeps, combinations(range(8), 4), strict=True):
            keep[list(kept)] = True
        fitted = reference.refit(row.expand(70, 8), H, keeps)
        best += min(reference.objective(row[None], one[None], H) for one in fitted)
    done = alps.prune(weight.clone(), gram(inputs), Unstructured(0.5, "row"), FITTED)
    masked = wanda.prune(weight.clone(), norms(inputs), Unstructured(0.5, "row"), Settings())
    assert best * (1 - 1e-4) <= reference.objective(weight, done.weight, H) < 1.2 * best
    assert reference.objective(weight, masked.weight, H) > 1.5 * best  # the figure above says something


def test_alps_stops_when_told_to() -> None:
    weight, inputs = example(6, 24)
    pattern = Unstructured(0.5, "layer")
    free = alps.prune(weight.clone(), gram(inputs), pattern, FITTED)
    assert 4 < free.notes["steps"] < 300  # the support settled
    for steps in (1, 4):
        done = alps.prune(weight.clone(), gram(inputs), pattern, replace(FITTED, iterations=steps))
        assert done.notes["steps"] == steps
        assert int(done.keep.sum()) == 72
        assert done.notes["error"] >= free.notes["error"]


def test_alps_is_the_same_at_any_scale_of_the_inputs() -> None:
    weight, inputs = example(6, 24)
    first, later = (
        alps.prune(weight.clone(), gram(size * inputs), Unstructured(0.5, "layer"), FITTED) for size in (1, 64)
    )
    assert torch.equal(first.keep, later.keep)
    torch.testing.assert_close(first.weight, later.weight)


# Rounding to a grid in the same pass

ON_GRID: list[Pattern] = [HALF, Unstructured(0.0, "columns"), Unstructured(0.7, "columns"), NofM(2, 4), NofM(4, 8)]
every_grid_pattern = pytest.mark.parametrize("pattern", ON_GRID, ids=str)


@every_grid_pattern
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("group_size", [8, 16])
def test_kept_weights_lie_on_the_grid(group_size: int, dtype: torch.dtype, pattern: Pattern) -> None:
    weight, inputs = example(6, 48)
    settings = Settings(bits=4, group_size=group_size, columns=16)
    done = sparsegpt.prune(weight.to(dtype), gram(inputs), pattern, settings)
    assert done.grid is not None
    assert done.grid.bits == 4
    assert done.grid.scale.shape == (6, 48 // group_size)
    assert done.grid.scale.dtype == done.weight.dtype == dtype
    assert torch.equal(done.grid.values(done.grid.codes(done.weight)), done.weight)
    assert (done.weight[~done.keep] == 0).all()
    if isinstance(pattern, NofM):
        assert done.keep.view(-1, pattern.of).sum(1).eq(pattern.keep).all()
    else:
        for end in (16, 32, 48):
            assert (
                int((~done.keep[:, end - 16 : end]).sum())
                == round(pattern.sparsity * 288) * end // 48 - round(pattern.sparsity * 288) * (end - 16) // 48
            )


@pytest.mark.parametrize(
    ("pattern", "group_size"), [(Unstructured(0.5, "columns"), 48), (Unstructured(0.5, "columns"), 12), (NofM(4, 8), 4)]
)
def test_groups_that_do_not_fit_blocks_of_columns_are_refused(pattern: Pattern, group_size: int) -> None:
    """Their scale would be set before all updates of the group are done."""
    weight, inputs = example(6, 48)
    with pytest.raises(Problem, match=r"prune\.group_size"):
        sparsegpt.prune(weight, gram(inputs), pattern, Settings(bits=4, group_size=group_size, columns=16))


@every_grid_pattern
@pytest.mark.parametrize(("bits", "group_size"), [(2, 8), (4, 8), (4, 16), (8, 16), (3, 8)])
def test_rounding_equals_its_twin(bits: int, group_size: int, pattern: Pattern) -> None:
    weight, inputs = example(6, 48)
    settings = Settings(bits=bits, group_size=group_size, columns=16)
    done = sparsegpt.prune(weight.clone(), gram(inputs), pattern, settings)
    twin = reference.sweep(weight, inputs, pattern, columns=16, bits=bits, group_size=group_size, ties_as=done.weight)
    assert_equals_twin(done, twin)


@pytest.mark.parametrize("method", [magnitude_obs, wanda_obs])
@every_choice
def test_other_masks_are_rounded_as_well(method: ModuleType, choose: str) -> None:
    weight, inputs = example(6, 48)
    settings = Settings(bits=4, group_size=8, columns=16, choose=choose)
    done = method.prune(weight.clone(), gram(inputs), Unstructured(0.5, "row"), settings)
    assert torch.equal(done.grid.values(done.grid.codes(done.weight)), done.weight)
    assert (done.weight[~done.keep] == 0).all()
    assert int(done.keep.sum()) == 144


@pytest.mark.parametrize(
    ("bits", "pattern", "share"),
    [
        (4, Unstructured(0.0, "columns"), 0.8),
        (3, HALF, 1.0),
        (4, HALF, 1.0),
        (3, NofM(2, 4), 1.0),
        (3, NofM(4, 8), 1.0),
    ],
    ids=str,
)
def test_rounding_in_the_same_pass_loses_less_than_rounding_afterwards(
    bits: int, pattern: Pattern, share: float
) -> None:
    """Over a dozen layers: which of two greedy ways ends lower in one layer is partly chance."""
    joint = after = 0.0
    for rows in range(6, 18):
        weight, inputs = example(rows, 48, tokens=400)
        settings = Settings(columns=16)
        both = sparsegpt.prune(weight.clone(), gram(inputs), pattern, replace(settings, bits=bits, group_size=8))
        pruned = sparsegpt.prune(weight.clone(), gram(inputs), pattern, settings)
        done = rtn.quantize(pruned.weight, bits, GridSettings(8))
        codes, grid = done.codes, done.grid
        joint += reference.layer_error(weight, both.weight, inputs)
        after += reference.layer_error(weight, grid.values(codes), inputs)
    assert joint < share * after


def test_no_bits_no_grid() -> None:
    weight, inputs = example(6, 48)
    assert sparsegpt.prune(weight, gram(inputs), HALF, Settings(group_size=8)).grid is None


@pytest.mark.parametrize("pattern", [HALF, Unstructured(0.33, "columns"), Unstructured(0.33, "row")], ids=str)
@pytest.mark.parametrize("columns", [1, 5, 16, 128])
def test_every_block_drops_its_share(columns: int, pattern: Unstructured) -> None:
    """Also where the share is no whole number: exact in sum, and within one a block."""
    weight, inputs = example(7, 37)
    keep = sparsegpt.prune(weight, gram(inputs), pattern, Settings(columns=columns)).keep
    total = round(pattern.sparsity * 7 * 37)
    assert int((~keep).sum()) == total
    for start in range(0, 37, columns):
        end = min(start + columns, 37)
        drops = (~keep[:, start:end]).sum(1)
        assert int(drops.sum()) == total * end // 37 - total * start // 37
        assert pattern.scope != "row" or int(drops.max() - drops.min()) <= 1


def test_a_mask_chosen_beforehand_is_that_of_the_whole_layer() -> None:
    weight, inputs = example(7, 37)
    keep = wanda_obs.prune(weight, gram(inputs), Unstructured(0.33, "row"), Settings(columns=5)).keep
    assert (~keep).sum(1).tolist() == row_counts(7, 37, 0.33)
    assert torch.equal(keep, keep_highest(wanda.score(weight, norms(inputs)), Unstructured(0.33, "row")))
