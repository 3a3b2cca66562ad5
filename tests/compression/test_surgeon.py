"""LLM Surgeon's arithmetic: costs and updates are those of the whole matrix G (x) A, thresholds count to the weight."""

from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compression.core.errors import Problem
from compression.surgeon import updates
from compression.surgeon.costs import column_costs, column_group_costs, element_costs, group_costs_nofm, row_costs
from compression.surgeon.factors import Factors, Inverses, alive, invert
from compression.surgeon.threshold import structured
from tests.reference import surgeon as reference

every_shape = pytest.mark.parametrize("shape", [(4, 5), (6, 3), (1, 6), (5, 1)], ids=str)
every_bias = pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
every_update = pytest.mark.parametrize("update", [True, False], ids=["update", "no update"])
every_seed = pytest.mark.parametrize("seed", range(4))
EXACT = 1e-13  # tolerance of `remove_elements`, for float64


class Layer(NamedTuple):
    """W' float64 [R, c], its curvature as measured, what is made of that, and the damped factors."""

    weight: Tensor
    factors: Factors
    inverses: Inverses
    G: Tensor
    A: Tensor


def example(rows: int, width: int, bias: bool = False, seed: int = 0) -> Layer:
    """Inputs and gradients hang together, so that every update matters."""
    draw = torch.Generator().manual_seed(1000 * seed + 10 * rows + width)

    def vectors(size: int) -> Tensor:
        mixing = torch.eye(size) + 0.5 * torch.randn(size, size, generator=draw)
        return torch.randn(100, size, generator=draw) @ mixing * torch.linspace(0.5, 2, size)

    inputs = torch.cat([vectors(width), torch.ones(100, int(bias))], 1)
    weight = torch.randn(rows, width + bias, generator=draw).double()
    factors = Factors(reference.mean_of_squares(inputs), reference.mean_of_squares(vectors(rows)))
    return make(weight, factors, bias)


def make(weight: Tensor, factors: Factors, bias: bool = False) -> Layer:
    damping = {"inputs": 0.01, "outputs": 0.1}
    rows, columns = alive(weight, factors, bias)
    inverses = Inverses(
        invert(factors.inputs, weight.shape[1], columns, damping["inputs"]),
        invert(factors.outputs, weight.shape[0], rows, damping["outputs"]),
    )
    one = [torch.eye(size, dtype=torch.float64) for size in weight.shape]
    G = one[0] if factors.outputs is None else reference.damped(factors.outputs, damping["outputs"])
    A = one[1] if factors.inputs is None else reference.damped(factors.inputs, damping["inputs"])
    return Layer(weight, factors, inverses, G, A)


def some(shape: tuple[int, int] | int, seed: int = 0) -> Tensor:
    """bool, half of it True, drawn at random."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5


def lines(weight: Tensor, dim: int, places: int | Tensor) -> Tensor:
    """bool like the weight, True in these rows (dim 0) or columns (dim 1)."""
    return torch.zeros(weight.shape, dtype=torch.bool).index_fill(dim, torch.as_tensor(places), True)


def rise(layer: Layer, changed: Tensor) -> float:
    return reference.rise(layer.G, layer.A, changed - layer.weight)


def assert_close(found: Tensor, exact: Tensor) -> None:
    torch.testing.assert_close(found, exact, rtol=1e-8, atol=1e-11 * float(exact.abs().max()))


# Costs


def exact_cost(layer: Layer, gone: Tensor, update: bool, G: Tensor, A: Tensor) -> float:
    """Of removing `gone`, with surgery or by zeroing, in the bowl G (x) A."""
    changed = reference.surgery(layer.weight, G, A, gone) if update else layer.weight.masked_fill(gone, 0)
    return reference.rise(G, A, changed - layer.weight)


@every_update
@every_bias
@every_shape
def test_a_cost_is_what_surgery_costs(shape: tuple[int, int], bias: bool, update: bool) -> None:
    """Damped where the update spreads to, not where it does not: there it cancels."""
    layer = example(*shape, bias)
    weight, (A, G) = layer.weight, (layer.factors.inputs, layer.factors.outputs)
    assert A is not None
    assert G is not None
    known = weight, layer.factors, layer.inverses, update

    def exact(gone: Tensor, spread: str) -> float:
        damped = spread if update else ""
        return exact_cost(layer, gone, update, layer.G if "G" in damped else G, layer.A if "A" in damped else A)

    (rows, width) = weight.shape
    elements = [
        [exact(lines(weight, 0, row) & lines(weight, 1, column), "GA") for column in range(width)]
        for row in range(rows)
    ]
    assert_close(element_costs(*known), torch.tensor(elements, dtype=torch.float64))
    assert_close(
        row_costs(*known), torch.tensor([exact(lines(weight, 0, row), "G") for row in range(rows)], dtype=torch.float64)
    )
    columns = [exact(lines(weight, 1, column), "A") for column in range(width)]
    assert_close(column_costs(*known), torch.tensor(columns, dtype=torch.float64))


@every_update
@every_bias
@pytest.mark.parametrize("groups", [[[0], [3]], [[0, 2], [4, 1], [5, 3]], [[5, 1, 2]], [[0, 1, 2, 3, 4, 5]]], ids=str)
def test_columns_of_a_group_go_together(groups: list[list[int]], bias: bool, update: bool) -> None:
    layer = example(4, 6, bias)
    assert layer.factors.inputs is not None
    assert layer.factors.outputs is not None
    A = layer.A if update else layer.factors.inputs
    exact = [
        exact_cost(layer, lines(layer.weight, 1, torch.tensor(group)), update, layer.factors.outputs, A)
        for group in groups
    ]
    found = column_group_costs(layer.weight, layer.factors, layer.inverses, torch.tensor(groups), update)
    assert_close(found, torch.tensor(exact, dtype=torch.float64))


@every_update
def test_a_group_of_one_costs_what_the_column_does(update: bool) -> None:
    layer = example(4, 6)
    known = layer.weight, layer.factors, layer.inverses
    assert_close(column_group_costs(*known, torch.arange(6)[:, None], update), column_costs(*known, update))


def test_without_gradients_an_element_costs_what_it_does_in_sparsegpt() -> None:
    layer = example(4, 5)
    layer = make(layer.weight, Factors(layer.factors.inputs, None))
    found = element_costs(layer.weight, layer.factors, layer.inverses, update=True)
    assert_close(found, layer.weight**2 / (2 * torch.linalg.inv(layer.A).diagonal()))


@every_update
def test_without_curvature_a_cost_is_half_the_square(update: bool) -> None:
    weight = example(4, 6).weight
    layer = make(weight, Factors(None, None))
    known = weight, layer.factors, layer.inverses
    assert_close(element_costs(*known, update), weight**2 / 2)
    assert_close(row_costs(*known, update), (weight**2).sum(1) / 2)
    assert_close(column_costs(*known, update), (weight**2).sum(0) / 2)
    groups = torch.tensor([[0, 5], [3, 1]])
    assert_close(column_group_costs(*known, groups, update), (weight**2).sum(0)[groups].sum(1) / 2)


def test_a_group_of_nofm_costs_what_goes_of_it() -> None:
    elements = torch.tensor([[4.0, 1, 3, 2, 0, 0, 5, 7], [1, 1, 1, 1, 9, 8, 7, 6]])
    assert group_costs_nofm(elements, 2, 4).tolist() == [[3, 0], [2, 13]]
    assert group_costs_nofm(elements, 1, 4).tolist() == [[6, 5], [3, 21]]
    assert group_costs_nofm(elements, 4, 8).tolist() == [[3], [4]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_cost_that_is_no_number_is_refused(bad: float) -> None:
    layer = example(4, 5)
    layer.weight[1, 2] = bad
    known = layer.weight, layer.factors, layer.inverses, True
    for cost in (element_costs, row_costs, column_costs):
        with pytest.raises(Problem, match="finite"):
            cost(*known)
    with pytest.raises(Problem, match="finite"):
        column_group_costs(*known[:3], torch.tensor([[1, 2]]), True)


# Updates


@every_seed
@every_bias
@every_shape
def test_rows_and_columns_go_as_surgery_takes_them(shape: tuple[int, int], bias: bool, seed: int) -> None:
    weight, _, inverses, G, A = example(*shape, bias, seed)
    P, Q = inverses.outputs, inverses.inputs
    rows, columns = some(shape[0], seed), some(shape[1] + bias, seed + 1)
    columns[-1] &= not bias
    by_rows, by_columns = rows[:, None].expand_as(weight), columns.expand_as(weight)
    assert_close(updates.remove_rows(weight, P, rows), reference.surgery(weight, G, A, by_rows))
    assert_close(updates.remove_columns(weight, Q, columns), reference.surgery(weight, G, A, by_columns))
    both = updates.remove_rows_and_columns(weight, P, Q, rows, columns)
    assert_close(both, reference.surgery(weight, G, A, by_rows | by_columns))
    assert (both[by_rows | by_columns] == 0).all()


@every_seed
@every_bias
@every_shape
def test_elements_go_as_surgery_takes_them(shape: tuple[int, int], bias: bool, seed: int) -> None:
    """Some had gone before: they stay zero, and others do not make up for them."""
    weight, _, inverses, G, A = example(*shape, bias, seed)
    keep = some(shape, seed)
    weight[:, : shape[1]] *= keep | some(shape, seed + 1)
    gone = torch.zeros_like(weight, dtype=torch.bool)
    gone[:, : shape[1]] = ~keep
    found = updates.remove_elements(weight, inverses.outputs, inverses.inputs, keep, 0, EXACT)
    assert_close(found, reference.surgery(weight, G, A, gone))
    assert (found[gone] == 0).all()


@every_bias
def test_independent_updates_are_those_of_each_alone(bias: bool) -> None:
    weight, _, inverses, G, A = example(4, 5, bias)
    P, Q, keep = inverses.outputs, inverses.inputs, some((4, 5))
    places = [lines(weight, 0, row) & lines(weight, 1, column) for row, column in (~keep).nonzero().tolist()]
    found = updates.remove_elements_independently(weight, P, Q, keep)
    assert_close(found, reference.one_by_one(weight, G, A, places))

    rows, columns = torch.tensor([1, 3]), torch.tensor([0, 2])
    parts = [lines(weight, 0, row) for row in rows] + [lines(weight, 1, column) for column in columns]
    found = updates.remove_lines_independently(weight, P, Q, lines(weight, 0, rows)[:, 0], lines(weight, 1, columns)[0])
    assert_close(found, reference.one_by_one(weight, G, A, parts))


@pytest.mark.parametrize(
    ("correlate", "ends"),
    [(1, [0, 1, 2, 3, 4, 5]), (4, [0, 1, 3, 5]), (5, [0, 2, 4, 5]), (7, [0, 3, 5]), (100, [0, 5]), (0, [0, 5])],
)
def test_groups_of_rows_take_turns(correlate: int, ends: list[int]) -> None:
    """The rows drop 3, 2, 2, 3 and 1 weights: a group has as many whole rows as fit, and one at least."""
    weight, _, inverses, G, A = example(5, 6)
    counts = [3, 2, 2, 3, 1]
    keep = torch.stack([torch.randperm(6, generator=torch.Generator().manual_seed(n)) for n in counts])
    keep = keep >= torch.tensor(counts)[:, None]
    turns = [slice(start, end) for start, end in pairwise(ends)]
    found = updates.remove_elements(weight, inverses.outputs, inverses.inputs, keep, correlate, EXACT)
    assert_close(found, reference.in_turns(weight, G, A, ~keep, turns))


@every_seed
@every_bias
def test_the_loss_never_rises_by_correlating(bias: bool, seed: int) -> None:
    """All remove the same. Independent updates, and groups, can be worse than none; all together cannot."""
    layer = example(6, 8, bias, seed)
    weight, P, Q = layer.weight, layer.inverses.outputs, layer.inverses.inputs
    rows, columns = some(6, seed), some(8 + bias, seed + 1)
    rows[:2], columns[-2:] = torch.tensor([True, False]), torch.tensor([True, False])
    zeroed = rise(layer, weight.masked_fill(rows[:, None] | columns, 0))
    alone = rise(layer, updates.remove_lines_independently(weight, P, Q, rows, columns))
    together = rise(layer, updates.remove_rows_and_columns(weight, P, Q, rows, columns))
    assert together < min(alone, zeroed)

    keep = some((6, 8), seed)
    gone = torch.zeros_like(weight, dtype=torch.bool)
    gone[:, :8] = ~keep
    zeroed = rise(layer, weight.masked_fill(gone, 0))
    alone = rise(layer, updates.remove_elements_independently(weight, P, Q, keep))
    together, in_groups, by_row = (
        rise(layer, updates.remove_elements(weight, P, Q, keep, correlate)) for correlate in (0, 12, 1)
    )
    assert together < min(alone, zeroed, in_groups, by_row)


@pytest.mark.parametrize("correlate", [0, 1, 300])
def test_a_layer_in_float32(correlate: int) -> None:
    """The default tolerance costs next to nothing, the same call gives the same bytes, the mask holds to the weight."""
    layer = example(40, 60)
    keep = some((40, 60))
    weight, P, Q = layer.weight.float(), layer.inverses.outputs.float(), layer.inverses.inputs.float()
    before = weight.clone()
    found = updates.remove_elements(weight, P, Q, keep, correlate)
    assert found.dtype == torch.float32
    assert torch.equal(found != 0, keep)
    assert torch.equal(updates.remove_elements(weight, P, Q, keep, correlate), found)
    assert torch.equal(weight, before)
    exact = updates.remove_elements(layer.weight, layer.inverses.outputs, layer.inverses.inputs, keep, correlate, EXACT)
    (lost, least) = (quadratic(layer, changed) for changed in (found, exact))
    assert lost == pytest.approx(least, rel=1e-3)
    assert lost < quadratic(layer, layer.weight * keep)


def quadratic(layer: Layer, changed: Tensor) -> float:
    """`rise`, without the whole matrix."""
    change = changed.double() - layer.weight
    return float(((layer.G @ change @ layer.A) * change).sum() / 2)


def test_an_update_that_cannot_be_found_is_refused() -> None:
    """Rather than one that is worse than none: what is nearly singular may not be positive once it is rounded."""
    weight, _, inverses, _, _ = example(6, 8)
    P, Q = (matrix + 100 * (1 - torch.eye(len(matrix))) for matrix in (inverses.outputs, inverses.inputs))
    with pytest.raises(Problem, match="damping"):
        updates.remove_elements(weight, P, Q, some((6, 8)), 0)
    with pytest.raises(Problem, match="damping"):
        updates.remove_rows(weight, P, torch.arange(6) < 3)


# What is dead, and factors


@every_bias
def test_what_is_dead(bias: bool) -> None:
    layer = example(4, 5, bias)
    A, G = (matrix.clone() for matrix in (layer.factors.inputs, layer.factors.outputs) if matrix is not None)
    weight = layer.weight
    weight[1], A[3], A[:, 3], G[2], G[:, 2] = 0, 0, 0, 0, 0
    weight[:, 0] = 0
    weight[:, 5:] = 0  # a bias of zeros
    rows, columns = alive(weight, Factors(A, G), bias)
    assert rows.tolist() == [True, False, False, True]
    assert columns.tolist() == [False, True, True, False, True] + [True] * bias
    rows, columns = alive(weight, Factors(None, None), bias)
    assert rows.tolist() == [True, False, True, True]
    assert columns.tolist() == [False, True, True, True, True] + [True] * bias


@every_bias
def test_what_is_dead_costs_nothing_and_asks_for_nothing(bias: bool) -> None:
    """What lives goes as if there was nothing else."""
    layer = example(5, 6, bias)
    A, G = (matrix.clone() for matrix in (layer.factors.inputs, layer.factors.outputs) if matrix is not None)
    layer.weight[1] = 0  # a row, whose gradients are not zero
    A[3], A[:, 3], G[2], G[:, 2] = 0, 0, 0, 0  # an input and an output, whose weights are not
    weight, factors, inverses, _, _ = make(layer.weight, Factors(A, G), bias)
    for update in (True, False):
        elements = element_costs(weight, factors, inverses, update)
        assert (elements[[1, 2]] == 0).all()
        assert (elements[:, 3] == 0).all()
        assert (row_costs(weight, factors, inverses, update) == 0).tolist() == [False, True, True, False, False]
        columns = column_costs(weight, factors, inverses, update)
        assert (columns == 0).nonzero().flatten().tolist() == [3]
        pairs = column_group_costs(weight, factors, inverses, torch.tensor([[3, 0], [4, 3]]), update)
        assert_close(pairs, columns[[0, 4]])

    rows, columns = torch.tensor([0, 3, 4]), torch.tensor([0, 1, 2, 4, 5] + [6] * bias)
    living = rows[:, None], columns
    small = make(weight[living], Factors(A[columns[:, None], columns], G[rows[:, None], rows]), bias)
    wide = torch.zeros_like(weight, dtype=torch.bool)
    wide[:, :6] = ~some((5, 6))
    gone_rows, gone_columns = lines(weight, 0, torch.tensor([0, 1]))[:, 0], lines(weight, 1, torch.tensor([2, 3]))[0]

    whole, cut = (own.inverses for own in (make(weight, factors, bias), small))
    for remove in (updates.remove_lines_independently, updates.remove_rows_and_columns):
        found = remove(weight, whole.outputs, whole.inputs, gone_rows, gone_columns)
        exact = remove(small.weight, cut.outputs, cut.inputs, gone_rows[rows], gone_columns[columns])
        assert_close(found[living], exact)
        assert (found[gone_rows[:, None] | gone_columns] == 0).all()
    for correlate in (0, 5, None):
        if correlate is None:
            found = updates.remove_elements_independently(weight, whole.outputs, whole.inputs, ~wide)
            exact = updates.remove_elements_independently(small.weight, cut.outputs, cut.inputs, ~wide[living])
        else:
            found = updates.remove_elements(weight, whole.outputs, whole.inputs, ~wide, correlate, EXACT)
            exact = updates.remove_elements(small.weight, cut.outputs, cut.inputs, ~wide[living], correlate, EXACT)
        assert_close(found[living], exact)
        dead = torch.ones_like(wide)
        dead[living] = False
        assert torch.equal(found[dead], weight.masked_fill(wide, 0)[dead])  # it does not move


@pytest.mark.parametrize("what", ["nothing", "everything"])
def test_nothing_and_everything(what: str) -> None:
    """A layer of which all goes asks nobody; one of which nothing goes stays what it is."""
    weight, _, inverses, _, _ = example(4, 5)
    P, Q = inverses.outputs, inverses.inputs
    rows, columns, keep = (torch.full(size, what == "everything") for size in ((4,), (5,), (4, 5)))
    exact = torch.zeros_like(weight) if what == "everything" else weight
    assert torch.equal(updates.remove_rows_and_columns(weight, P, Q, rows, columns), exact)
    assert torch.equal(updates.remove_lines_independently(weight, P, Q, rows, columns), exact)
    assert torch.equal(updates.remove_elements(weight, P, Q, ~keep, 0), exact)
    assert torch.equal(updates.remove_elements(weight, P, Q, ~keep, 3), exact)
    assert torch.equal(updates.remove_elements_independently(weight, P, Q, ~keep), exact)


def test_a_dead_layer_is_left_alone() -> None:
    layer = make(torch.zeros(3, 4).double(), Factors(torch.eye(4).double(), torch.eye(3).double()))
    P, Q = layer.inverses.outputs, layer.inverses.inputs
    assert (element_costs(layer.weight, layer.factors, layer.inverses, True) == 0).all()
    assert (updates.remove_elements(layer.weight, P, Q, some((3, 4)), 0) == 0).all()


def test_the_inverse_is_that_of_what_lives() -> None:
    A = example(3, 5).factors.inputs
    assert A is not None
    living = torch.tensor([True, False, True, True, True])
    found = invert(A, 5, living, 0.02)
    assert (found[1] == 0).all()
    assert (found[:, 1] == 0).all()
    assert_close(found[living][:, living], torch.linalg.inv(reference.damped(A[living][:, living], 0.02)))
    assert invert(A.float(), 5, living, 0.02).dtype == torch.float32
    assert torch.equal(invert(None, 5, living, 0.02), torch.diag(living.float()))
    assert (invert(A, 5, torch.zeros(5, dtype=torch.bool), 0.02) == 0).all()


def test_damping_rises_until_a_factor_can_be_inverted() -> None:
    """From none: a matrix of rank one needs some. One that is not positive needs too much, and NaN has no remedy."""
    A = torch.ones(3, 3).double()
    everything = torch.ones(3, dtype=torch.bool)
    assert_close(invert(A, 3, everything, 0.0), torch.linalg.inv(reference.damped(A, 1e-4)))
    for bad in (-A, torch.full((3, 3), float("nan")), torch.full((3, 3), float("inf"))):
        with pytest.raises(Problem, match="inverted"):
            invert(bad, 3, everything, 0.01)


def test_the_balance_of_the_factors_moves_neither_costs_nor_updates() -> None:
    plain = example(3, 5)
    assert plain.factors.inputs is not None
    assert plain.factors.outputs is not None
    other = make(plain.weight, Factors(1e6 * plain.factors.inputs, plain.factors.outputs / 1e6))
    keep = torch.rand(3, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    for costs in (element_costs, row_costs, column_costs):
        for update in (True, False):
            one, two = (costs(own.weight, own.factors, own.inverses, update) for own in (plain, other))
            assert_close(one, two)
    one, two = (
        updates.remove_elements(own.weight, own.inverses.outputs, own.inverses.inputs, keep, 0, EXACT)
        for own in (plain, other)
    )
    assert_close(one, two)


# The threshold


@st.composite
def case(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of `structured`, with many equal costs; the budget may be too much."""
    shapes = {
        f"layer{place}": (draw(st.integers(1, 6)), draw(st.integers(1, 6))) for place in range(draw(st.integers(1, 4)))
    }
    cost = st.integers(0, 5).map(float)
    costs = {
        layer: tuple(
            torch.tensor([draw(cost) for _ in range(size)]) if draw(st.integers(0, 4)) else None for size in shape
        )
        for layer, shape in shapes.items()
    }
    total = sum(rows * width for rows, width in shapes.values())
    most = {layer: draw(st.integers(0, rows * width)) for layer, (rows, width) in shapes.items()}
    return {"costs": costs, "shapes": shapes, "budget": draw(st.integers(0, total)), "most": most}


@given(case())
def test_the_threshold_is_that_of_its_twin(arguments: dict[str, Any]) -> None:
    tables = {
        layer: tuple(
            [float("inf")] * size if own is None else own.tolist() for own, size in zip(both, shape, strict=True)
        )
        for (layer, both), shape in zip(arguments["costs"].items(), arguments["shapes"].values(), strict=True)
    }
    bound = arguments["most"]
    exact = reference.threshold(tables, arguments["budget"], bound)
    total = sum(int(own.sum()) for own in exact.values())
    if total < arguments["budget"]:
        with pytest.raises(Problem, match=rf"{arguments['budget']} weights .* {total} can"):
            structured(**arguments)
        return
    found = structured(**arguments)
    assert {layer: (rows[:, None] | columns).tolist() for layer, (rows, columns) in found.items()} == {
        layer: own.tolist() for layer, own in exact.items()
    }
    for layer, (rows, columns) in found.items():
        assert int((rows[:, None] | columns).sum()) <= bound[layer]
        assert not rows.all()
        assert not columns.all()


def test_the_last_line_reaches_the_budget() -> None:
    """At least the budget, and without the last one less; the cheapest of all layers first."""
    draw = torch.Generator().manual_seed(1)
    shapes = {"a": (20, 30), "b": (50, 20)}
    costs = {layer: (torch.rand(R, generator=draw), torch.rand(C, generator=draw)) for layer, (R, C) in shapes.items()}
    found = structured(costs, shapes, 700, {"a": 600, "b": 1000})
    going = sum(int((rows[:, None] | columns).sum()) for rows, columns in found.values())
    gone = torch.cat([own[mask] for layer in found for own, mask in zip(costs[layer], found[layer], strict=True)])
    stays = torch.cat([own[~mask] for layer in found for own, mask in zip(costs[layer], found[layer], strict=True)])
    assert 700 <= going < 700 + 50
    assert gone.max() <= stays.min()


def test_equal_costs_go_from_the_front() -> None:
    shapes = {"a": (3, 4), "b": (3, 4)}
    costs = {layer: (torch.ones(3), torch.ones(4)) for layer in shapes}
    found = structured(costs, shapes, 12, {"a": 10, "b": 12})
    # Of a: two rows leave one of four; two columns more would make ten, three eleven. Then a row of b.
    assert [mask.tolist() for mask in found["a"]] == [[True, True, False], [True, True, False, False]]
    assert [mask.tolist() for mask in found["b"]] == [[True, False, False], [False] * 4]


def test_no_budget_takes_nothing_and_no_layers_have_none() -> None:
    found = structured({"a": (torch.zeros(2), None)}, {"a": (2, 3)}, 0, {"a": 6})
    assert not found["a"][0].any()
    assert structured({}, {}, 0, {}) == {}
    with pytest.raises(Problem):
        structured({}, {}, 1, {})


def test_costs_of_wide_groups_are_the_same_on_two_threads() -> None:
    """torch's LU of a batch is not."""
    draw = torch.Generator().manual_seed(0)
    mixing, weight = torch.randn(576, 700, generator=draw), torch.randn(40, 576, generator=draw)
    factors = Factors(mixing @ mixing.T / 700, None)
    inverses = Inverses(invert(factors.inputs, 576, torch.ones(576, dtype=torch.bool), 0.01), torch.eye(40))
    groups = torch.arange(576).view(3, 192)
    one = column_group_costs(weight, factors, inverses, groups, True)
    try:
        torch.set_num_threads(2)
        for _ in range(5):
            torch.testing.assert_close(column_group_costs(weight, factors, inverses, groups, True), one)
    finally:
        torch.set_num_threads(1)
