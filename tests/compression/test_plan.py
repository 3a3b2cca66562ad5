"""Plans of bits: the sensitive never get fewer, budgets hold, the cheapest is the cheapest, nothing is torn apart."""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compression.core.checkpoint import Checkpoint
from compression.core.errors import Problem
from compression.importing import import_model
from compression.quantization import knapsack
from compression.quantization.fused import Group, fused_groups
from compression.quantization.grid import GroupSize, fit_grid
from compression.quantization.knapsack import least_choice
from compression.quantization.method import Settings
from compression.quantization.packed import Layout, pack
from compression.quantization.plan import (
    Plan,
    average_bits,
    block_groups,
    by_budget,
    by_kmeans,
    by_layer,
    by_percentile,
    by_share,
    cheapest_under,
    check_plan,
    group_sizes,
    head_tail,
    layer_size,
    random_plan,
    total_size,
    uniform,
)
from tests.compression.helpers import all_tensors, quantize
from tests.conftest import Make
from tests.reference import plan as reference

WIDTHS = (2, 3, 4, 8, 16)
DEPTH = 6
SHAPES = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64),
    "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (160, 64),
    "mlp.up_proj": (160, 64),
    "mlp.down_proj": (64, 160),
}
BLOCKS = {f"model.layers.{block}.{name}": block for block in range(DEPTH) for name in SHAPES}
LAYERS = {layer: SHAPES[layer.split(".", 3)[3]] for layer in BLOCKS}
GROUPS = fused_groups(LAYERS)
WEIGHTS = sum(rows * width for rows, width in LAYERS.values())


def some_costs(seed: int = 0, noise: float = 0.1) -> dict[Group, dict[int, float]]:
    """Falling by a quarter a bit from a start of its own for every group, and not quite evenly."""
    draw = np.random.default_rng(seed)
    start = np.exp(draw.normal(size=len(GROUPS)))
    return {
        group: {bits: float(start[place] * 4.0**-bits * np.exp(noise * draw.normal())) for bits in WIDTHS}
        for place, group in enumerate(GROUPS)
    }


def some_scores(seed: int = 0) -> dict[Group, float]:
    return dict(zip(GROUPS, np.random.default_rng(seed).lognormal(size=len(GROUPS)).tolist(), strict=True))


# Groups.


def test_fused_layers_are_grouped_in_the_order_of_the_model() -> None:
    block = "model.layers.0"
    assert GROUPS[:4] == [
        (f"{block}.self_attn.q_proj", f"{block}.self_attn.k_proj", f"{block}.self_attn.v_proj"),
        (f"{block}.self_attn.o_proj",),
        (f"{block}.mlp.gate_proj", f"{block}.mlp.up_proj"),
        (f"{block}.mlp.down_proj",),
    ]
    assert len(GROUPS) == 4 * DEPTH
    assert block_groups(BLOCKS) == [tuple(layer for layer in BLOCKS if BLOCKS[layer] == b) for b in range(DEPTH)]


@pytest.mark.parametrize(
    ("family", "fused"),
    [
        ("llama", {"q_proj k_proj v_proj", "gate_proj up_proj"}),
        ("gemma3", {"q_proj k_proj v_proj", "gate_proj up_proj"}),
        ("opt", {"q_proj k_proj v_proj"}),
        ("bert", {"query key value"}),
        ("gpt_neox", set()),
    ],
)
def test_families_have_the_groups_that_runtimes_fuse(family: str, fused: set[str], imported: Make) -> None:
    layers = Checkpoint(imported(family)).layers
    groups = fused_groups(layers)
    assert sorted(layer for group in groups for layer in group) == sorted(layers)
    together = {frozenset(layer.rpartition(".")[2] for layer in group) for group in groups if len(group) > 1}
    assert together == {frozenset(names.split()) for names in fused}
    assert all(len({layer.rpartition(".")[0] for layer in group}) == 1 for group in groups)


def test_a_plan_that_tears_a_fused_group_is_refused() -> None:
    bits = dict.fromkeys(LAYERS, 4)
    check_plan(bits, GROUPS)
    bits["model.layers.2.self_attn.k_proj"] = 8
    named = r"layers\.2\.self_attn\.q_proj: 4, .*layers\.2\.self_attn\.k_proj: 8, .*layers\.2\.self_attn\.v_proj: 4\n"
    with pytest.raises(Problem, match=named):
        check_plan(bits, GROUPS)
    del bits["model.layers.3.mlp.up_proj"]
    with pytest.raises(Problem, match=r"\(and 1 more groups\)"):
        check_plan(bits, GROUPS)
    with pytest.raises(Problem, match=r"gate_proj: 4, .*up_proj: none"):
        check_plan(bits, [group for group in GROUPS if "model.layers.3.mlp.up_proj" in group])
    del bits["model.layers.3.mlp.gate_proj"]  # neither is quantised
    check_plan(bits, [group for group in GROUPS if "model.layers.3.mlp.up_proj" in group])


def every_rule(budget: int) -> dict[str, Plan]:
    scores, costs, sizes = some_scores(), some_costs(), group_sizes(GROUPS, LAYERS, WIDTHS)
    return {
        "uniform": uniform(GROUPS, 4),
        "share": by_share(scores, 0.3, 4, 8),
        "percentile": by_percentile(scores, {2: 0.25, 4: 0.5, 8: 0.25}),
        "kmeans": by_kmeans(scores, WIDTHS),
        "budget": by_budget(costs, sizes, budget),
        "ceiling": cheapest_under(costs, sizes, 0.1),
        "head and tail": head_tail(BLOCKS, sizes, budget, 2, 8),
        "random": random_plan(sizes, budget, 0),
    }


@pytest.mark.parametrize("rule", every_rule(4 * WEIGHTS))
def test_no_rule_tears_a_group_or_forgets_a_layer(rule: str) -> None:
    bits = by_layer(every_rule(4 * WEIGHTS)[rule], LAYERS)
    assert list(bits) == list(LAYERS)
    check_plan(bits, GROUPS)
    assert rule == "uniform" or len(set(bits.values())) > 1


# Sizes.


@pytest.mark.parametrize(
    ("layout", "group_size", "symmetric", "bits"),
    [
        ("packed", 16, True, None),
        ("packed", 16, False, 3),
        ("packed", "row", True, None),
        ("packed", "row", False, 5),
        ("packed", "tensor", False, None),
        ("loose", 16, False, None),
    ],
)
def test_stored_size_is_that_of_a_packed_checkpoint(
    layout: Layout, group_size: GroupSize, symmetric: bool, bits: int | None, original: Make, tmp_path: Path
) -> None:
    """Layer by layer, every tensor that stands for it; 4 and 8 bits mixed, or `bits` everywhere."""
    import_model(original("llama"), tmp_path / "half", "bfloat16", {})
    source = Checkpoint(tmp_path / "half")
    packed = quantize(source, tmp_path / "packed", settings=Settings(group_size, symmetric), bits=bits)
    sizes = stored_bits(all_tensors(packed))
    for layer, shape in source.layers.items():
        width = packed.manifest["quantization"]["bits"][layer]
        assert layer_size(shape, width, group_size, symmetric, layout) == sizes[layer]
        assert layer_size(shape, 16, group_size, symmetric, layout) == stored_bits(all_tensors(source))[layer]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [16, "row", "tensor"])
def test_stored_size_of_an_embedding_in_bytes(group_size: GroupSize, symmetric: bool) -> None:
    weight = torch.randn(6, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    grid = fit_grid(weight, 8, group_size, symmetric)
    stored = stored_bits(pack("embed", grid.codes(weight), grid, "bytes"))
    assert layer_size((6, 48), 8, group_size, symmetric, "bytes") == stored["embed"]


def stored_bits(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """By module, all its tensors."""
    sizes: dict[str, int] = {}
    for name, tensor in tensors.items():
        module = name.rpartition(".")[0]
        sizes[module] = sizes.get(module, 0) + 8 * tensor.nbytes
    return sizes


def test_average_is_weighted_by_size() -> None:
    layers = {"a": (10, 10), "b": (10, 30)}
    assert average_bits({"a": 8, "b": 4}, layers) == 5
    plan = by_budget(some_costs(), group_sizes(GROUPS, LAYERS, WIDTHS), 4 * WEIGHTS)
    sizes = group_sizes(GROUPS, LAYERS, WIDTHS)
    assert average_bits(by_layer(plan, LAYERS), LAYERS) == pytest.approx(total_size(plan, sizes) / WEIGHTS)


# By score.

scores_of = st.lists(st.floats(-1e3, 1e3) | st.sampled_from([0.0, 1.0, 2.0]), min_size=1, max_size=9).map(
    lambda numbers: {(f"layer{place}",): number for place, number in enumerate(numbers)}
)
some_widths = st.sets(st.sampled_from(WIDTHS), min_size=1, max_size=4)


def assert_monotone(scores: Mapping[Group, float], plan: Plan) -> None:
    """A group that is more sensitive than another never has fewer bits."""
    assert list(plan) == list(scores)
    for one in scores:
        for other in scores:
            assert scores[one] <= scores[other] or plan[one] >= plan[other]


@given(scores_of, some_widths)
@settings(deadline=None)
def test_kmeans_finds_the_best_clusters_and_sorts_them(scores: dict[Group, float], widths: set[int]) -> None:
    plan = by_kmeans(scores, widths)
    assert_monotone(scores, plan)
    ordered = sorted(scores.values())
    assert all(plan[a] == plan[b] for a in scores for b in scores if scores[a] == scores[b])
    clusters = min(len(widths), len(set(ordered)))
    assert sorted(set(plan.values())) == sorted(widths)[:clusters]
    bits = sorted(plan.values())
    cuts = [0, *(place for place, (a, b) in enumerate(pairwise(bits), 1) if a != b), len(bits)]
    error = reference.sum_of_squares(ordered, cuts)
    assert error <= reference.kmeans_error(ordered, clusters) * (1 + 1e-9) + 1e-9


def test_kmeans_sees_the_clusters_and_gives_the_most_sensitive_most() -> None:
    scores: dict[Group, float] = {("a",): 0.1, ("b",): 9.0, ("c",): 1.1, ("d",): 0.2, ("e",): 1.0, ("f",): 0.15}
    plan = by_kmeans(scores, (16, 4, 8))
    assert list(plan.values()) == [4, 16, 8, 4, 8, 4]
    scaled: dict[Group, float] = {group: 1e-7 * score for group, score in scores.items()}
    assert by_kmeans(scaled, (4, 8, 16)) == plan


@given(scores_of, st.lists(st.integers(0, 16), min_size=3, max_size=3))
@settings(deadline=None)
def test_percentiles_are_cut_by_rank(scores: dict[Group, float], cuts: list[int]) -> None:
    ends = [0, *sorted(cuts), 16]
    shares = {bits: (end - start) / 16 for bits, (start, end) in zip((2, 4, 8, 16), pairwise(ends), strict=True)}
    plan = by_percentile(scores, shares)
    assert_monotone(scores, plan)
    assert plan == reference.percentile(scores, shares)


def test_percentiles_of_many_groups_are_as_large_as_they_should_be() -> None:
    plan = by_percentile(some_scores(), {4: 0.25, 16: 0.25, 8: 0.5})
    assert [list(plan.values()).count(bits) for bits in (4, 8, 16)] == [6, 12, 6]


@given(scores_of, st.floats(0, 1))
@settings(deadline=None)
def test_share_widens_so_many_of_the_most_sensitive(scores: dict[Group, float], share: float) -> None:
    plan = by_share(scores, share, 4, 8)
    assert_monotone(scores, plan)
    assert list(plan.values()).count(8) == round(share * len(scores))
    assert set(plan.values()) <= {4, 8}


def test_the_most_sensitive_blocks_get_more_bits_and_ties_go_to_the_earlier() -> None:
    scores = dict(zip(block_groups(BLOCKS), [0.5, 3.0, -1.0, 3.0, 0.1, 0.2], strict=True))
    wide = []
    for share in (0.0, 0.2, 0.3, 0.5, 1.0):
        bits = by_layer(by_share(scores, share, 4, 8), LAYERS)
        check_plan(bits, block_groups(BLOCKS))
        wide.append({BLOCKS[layer] for layer, own in bits.items() if own == 8})
    assert wide == [set(), {1}, {1, 3}, {0, 1, 3}, {0, 1, 2, 3, 4, 5}]


def test_scores_that_are_not_finite_are_refused() -> None:
    scores: dict[Group, float] = {("fine",): 1.0, ("broken",): float("nan")}
    with pytest.raises(Problem, match="broken: its scores are not all finite"):
        by_kmeans(scores, (4, 8))
    with pytest.raises(Problem, match="broken: its scores are not all finite"):
        by_percentile(scores, {4: 0.5, 8: 0.5})
    with pytest.raises(Problem, match="broken: its costs are not all finite"):
        by_budget({("broken",): {4: float("inf")}}, {("broken",): {4: 1}}, 10)


# By cost.


@st.composite
def problems(draw: st.DrawFn) -> tuple[dict[Group, dict[int, float]], dict[Group, dict[int, int]], float]:
    """Costs of any sign and order, sizes with and without a common measure, and how much of the range may be spent."""
    cost = st.one_of(st.integers(-3, 5).map(float), st.floats(-1, 1))
    size = st.integers(1, 6) if draw(st.booleans()) else st.integers(1, 10**8)
    costs: dict[Group, dict[int, float]] = {}
    sizes: dict[Group, dict[int, int]] = {}
    for number in range(draw(st.integers(1, 5))):
        widths = sorted(draw(st.sets(st.sampled_from(WIDTHS), min_size=1, max_size=4)))
        costs[f"layer{number}",] = {bits: draw(cost) for bits in widths}
        sizes[f"layer{number}",] = {bits: draw(size) for bits in widths}
    return costs, sizes, draw(st.floats(0, 1))


@given(problems())
@settings(deadline=None, max_examples=150)
def test_the_cheapest_within_a_budget_is_the_best_of_all_plans(problem: tuple) -> None:
    costs, sizes, part = problem
    low = sum(min(own.values()) for own in sizes.values())
    high = sum(max(own.values()) for own in sizes.values())
    budget = low + int(part * (high - low))
    plan = by_budget(costs, sizes, budget)
    best = reference.least(costs, sizes, budget)
    assert best is not None
    assert total_size(plan, sizes) <= budget
    assert reference.total(costs, plan) == pytest.approx(best[0], abs=1e-9)


@given(problems())
@settings(deadline=None, max_examples=150)
def test_the_smallest_under_a_ceiling_is_the_best_of_all_plans(problem: tuple) -> None:
    costs, sizes, part = problem
    low = sum(min(own.values()) for own in costs.values())
    high = sum(max(own.values()) for own in costs.values())
    ceiling = low + part * (high - low) + 1e-9
    plan = cheapest_under(costs, sizes, ceiling)
    best = reference.least(sizes, costs, ceiling)
    assert best is not None
    assert reference.total(costs, plan) <= ceiling + 1e-11
    assert total_size(plan, sizes) <= best[0]


def test_of_plans_of_equal_cost_the_smaller_one() -> None:
    costs: dict[Group, dict[int, float]] = {("a",): {2: 1.0, 4: 1.0, 8: 1.0}, ("b",): {2: 3.0, 4: 2.0, 8: 2.0}}
    sizes: dict[Group, dict[int, int]] = {group: {2: 2, 4: 4, 8: 8} for group in costs}
    assert by_budget(costs, sizes, 100) == {("a",): 2, ("b",): 4}


def test_more_budget_never_costs_more_and_a_ceiling_undoes_a_budget() -> None:
    costs, sizes = some_costs(), group_sizes(GROUPS, LAYERS, WIDTHS, 32, symmetric=False)
    spent = []
    for average in (2.9, 3.5, 4.0, 4.6, 6.0, 12.0, 16.0):
        plan = by_budget(costs, sizes, average * WEIGHTS)
        cost = reference.total(costs, plan)
        assert total_size(plan, sizes) <= average * WEIGHTS
        spent.append(cost)
        again = cheapest_under(costs, sizes, cost)
        assert total_size(again, sizes) <= total_size(plan, sizes)
        assert reference.total(costs, again) == pytest.approx(cost)
    assert spent == sorted(spent, reverse=True)
    assert len(set(spent)) == len(spent)


def test_a_model_of_two_hundred_groups_is_solved_to_its_proven_optimum() -> None:
    """No brute force here: the best plan at sizes in small whole units, by filling a table of every size."""
    draw = np.random.default_rng(0)
    units = np.tile([5, 3, 16, 8], 52)
    values = draw.lognormal(size=(208, 1)) * 4.0 ** -np.array([2, 3, 4, 8, 16]) + 1e-4 * draw.normal(size=(208, 5))
    weights = units[:, None] * np.array([2, 3, 4, 8, 16])
    limit = 4 * int(units.sum())
    table = np.zeros(limit + 1)
    for value, weight in zip(values, weights.tolist(), strict=True):
        options = [
            np.append(np.full(w, np.inf), table[: limit + 1 - w]) + v for v, w in zip(value, weight, strict=True)
        ]
        table = np.min(options, axis=0)
    scale = 110592 / 3 + 1 / 3  # what the sizes are in bits does not matter
    found = least_choice(values.tolist(), (weights * scale).tolist(), limit * scale)
    chosen = found.places
    assert found.gap == 0
    assert sum(weights[place, own] for place, own in enumerate(chosen)) <= limit
    assert sum(values[place, own] for place, own in enumerate(chosen)) == pytest.approx(table.min(), abs=1e-12)


@given(problems())
@settings(deadline=None, max_examples=100)
def test_a_front_cut_short_tells_how_far_off_its_plan_may_be(problem: tuple) -> None:
    """With room for one partial choice only: the plan keeps to the budget, and the best one is within the gap."""
    costs, sizes, part = problem
    low = sum(min(own.values()) for own in sizes.values())
    high = sum(max(own.values()) for own in sizes.values())
    budget = low + int(part * (high - low))
    gaps: list[float] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knapsack, "FRONT", 1)
        plan = by_budget(costs, sizes, budget, tell=gaps.append)
    best = reference.least(costs, sizes, budget)
    assert best is not None
    assert total_size(plan, sizes) <= budget
    assert reference.total(costs, plan) <= best[0] + sum(gaps) + 1e-9


def test_what_has_no_short_front_is_solved_all_the_same() -> None:
    """Values and weights that all differ and go together: the hardest there are. A few thousandths are not far off."""
    draw = np.random.default_rng(0)
    weights = np.cumsum(draw.uniform(1, 2, size=(120, 4)), axis=1)
    values = -weights + 1e-4 * draw.normal(size=weights.shape)
    limit = float(weights.sum(0)[1:3].mean())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knapsack, "FRONT", 500)
        found = least_choice(values.tolist(), weights.tolist(), limit)
    spent = [weights[item, place] for item, place in enumerate(found.places)]
    assert sum(spent) <= limit + 1e-9
    worth = sum(values[item, place] for item, place in enumerate(found.places))
    assert worth < -limit + 0.01  # what is worth its weight, and hardly more, cannot be worth much more than the limit
    assert 0 < found.gap < 0.01


def test_what_cannot_be_reached_is_refused_with_the_least_that_can() -> None:
    costs: dict[Group, dict[int, float]] = {("a",): {4: 0.5, 8: 0.25}, ("b",): {4: 0.125, 8: 0.0}}
    sizes: dict[Group, dict[int, int]] = {group: {4: 400, 8: 800} for group in costs}
    with pytest.raises(Problem, match=r"quantize\.budget: no plan keeps to 799\n  the least possible: 800$"):
        by_budget(costs, sizes, 799)
    assert by_budget(costs, sizes, 800) == {("a",): 4, ("b",): 4}
    with pytest.raises(Problem, match=r"quantize\.ceiling: no plan keeps to 0\.2\n  the least possible: 0\.25$"):
        cheapest_under(costs, sizes, 0.2)
    assert cheapest_under(costs, sizes, 0.25) == {("a",): 8, ("b",): 8}
    with pytest.raises(Problem, match="the least possible: 800"):
        head_tail({"a": 0, "b": 1}, sizes, 799, 4, 8)
    with pytest.raises(Problem, match="the least possible: 800"):
        random_plan(sizes, 799, 0)


# For comparison.


@pytest.mark.parametrize("average", [2.6, 4.1, 4.5, 7.3])
def test_baselines_are_as_large_as_what_they_are_compared_with(average: float) -> None:
    """They stay within the budget, and what they leave of it widens no group."""
    sizes = group_sizes(GROUPS, LAYERS, (2, 4, 8), 32)
    costs = {group: {bits: own[bits] for bits in (2, 4, 8)} for group, own in some_costs().items()}
    budget = total_size(by_budget(costs, sizes, average * WEIGHTS), sizes)
    plans = [random_plan(sizes, budget, seed) for seed in range(5)] + [head_tail(BLOCKS, sizes, budget, 2, 8)]
    for plan, widths in zip(plans, [(2, 4, 8)] * 5 + [(2, 8)], strict=True):
        left = budget - total_size(plan, sizes)
        assert left >= 0
        for group, bits in plan.items():
            assert all(sizes[group][wider] - sizes[group][bits] > left for wider in widths if wider > bits)


def test_head_and_tail_widen_the_outer_blocks() -> None:
    sizes = group_sizes(GROUPS, LAYERS, (4, 8))
    block = WEIGHTS // DEPTH
    wide = []
    for count in range(DEPTH + 1):
        bits = by_layer(head_tail(BLOCKS, sizes, 4 * WEIGHTS + 4 * count * block, 4, 8), LAYERS)
        assert average_bits(bits, LAYERS) == pytest.approx(4 + 4 * count / DEPTH)
        wide.append({BLOCKS[layer] for layer, own in bits.items() if own == 8})
    assert wide == [set(), {0}, {0, 5}, {0, 1, 5}, {0, 1, 4, 5}, {0, 1, 2, 4, 5}, {0, 1, 2, 3, 4, 5}]


def test_random_plans_differ_by_seed_and_favour_no_depth() -> None:
    sizes = group_sizes(GROUPS, LAYERS, (2, 4, 8))
    plans = [by_layer(random_plan(sizes, 4 * WEIGHTS, seed), LAYERS) for seed in range(100)]
    assert plans[3] == by_layer(random_plan(sizes, 4 * WEIGHTS, 3), LAYERS)
    assert len({tuple(bits.values()) for bits in plans}) == 100
    for block in range(DEPTH):
        own = {layer: shape for layer, shape in LAYERS.items() if BLOCKS[layer] == block}
        assert np.mean([average_bits(bits, own) for bits in plans]) == pytest.approx(4, abs=0.4)
    assert {width for bits in plans for width in bits.values()} == {2, 4, 8}


def test_the_exact_plan_beats_the_baselines_on_what_it_is_given() -> None:
    costs, sizes = some_costs(), group_sizes(GROUPS, LAYERS, WIDTHS)
    best = reference.total(costs, by_budget(costs, sizes, 4 * WEIGHTS))
    others = [uniform(GROUPS, 4), head_tail(BLOCKS, sizes, 4 * WEIGHTS, 2, 8)]
    others += [random_plan(sizes, 4 * WEIGHTS, seed) for seed in range(5)]
    assert all(best < reference.total(costs, other) for other in others)
