"""Which layers share bits, and how many bits each of them gets.

A rule is handed groups of layers and gives each group one width, so it cannot tear apart what has to stay together.
Groups are what runtimes fuse (compression.quantization.fused), or whole blocks as CPTQuant has them (arXiv 2412.03599,
`block_groups`); `by_layer` spells a plan out. A larger score means that the group suffers more.

Budgets are in the unit of the sizes. `head_tail` and `random_plan` are there to be compared with: given the same budget
they spend it, widening groups until what is left of it is too little to widen any group they may.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from math import ceil, isfinite

import numpy as np
import torch
from numpy.typing import NDArray

from compression.core.errors import Problem
from compression.quantization.fused import Group
from compression.quantization.grid import GroupSize
from compression.quantization.knapsack import least_choice
from compression.quantization.packed import Layout

Plan = dict[Group, int]  # bits by group
Sizes = Mapping[Group, Mapping[int, int]]  # bits or bytes, by group and width
Costs = Mapping[Group, Mapping[int, float]]
Numbers = Sizes | Costs
Tell = Callable[[float], None]

UNPACKED = 16  # bits of a weight that is on no grid
SCALE = 16  # bits of a scale, which has the type of the weights
WORD = 32  # bits of the integers that codes are packed into
BYTE = 8  # bits of a code, or a zero point, that is not packed
SHAPE = 128  # bits of a layer's `weight_shape`
GLOBAL_SCALE = 32  # bits of that of layout `loose`


# Groups.


def block_groups(blocks: Mapping[str, int]) -> list[Group]:
    """All layers of a block in one group; `blocks` has the block of each layer."""
    groups: dict[int, list[str]] = {}
    for layer, block in blocks.items():
        groups.setdefault(block, []).append(layer)
    return [tuple(group) for group in groups.values()]


def by_layer(plan: Mapping[Group, int], layers: Iterable[str]) -> dict[str, int]:
    """Bits by layer, in the order of `layers`."""
    bits = {layer: width for group, width in plan.items() for layer in group}
    return {layer: bits[layer] for layer in layers}


def check_plan(bits: Mapping[str, int], groups: Iterable[Group]) -> None:
    """Raises Problem when layers of a group differ in bits; a layer without bits is one that is not quantised."""
    torn = [group for group in groups if len({bits.get(layer) for layer in group}) > 1]
    if torn:
        widths = ", ".join(f"{layer}: {bits.get(layer, 'none')}" for layer in torn[0])
        more = f" (and {len(torn) - 1} more groups)" if len(torn) > 1 else ""
        raise Problem(
            "the plan of bits",
            f"layers that runtimes fuse would differ in bits: {widths}{more}",
            "give all layers of a group the same number of bits",
        )


# Sizes.


def average_bits(bits: Mapping[str, int], layers: Mapping[str, Sequence[int]]) -> float:
    """Mean bits of a weight over layers of shapes [out, in]; scales and zero points are not counted."""
    weights = {layer: rows * width for layer, (rows, width) in layers.items()}
    return sum(bits[layer] * count for layer, count in weights.items()) / sum(weights.values())


def group_sizes(
    groups: Iterable[Group],
    layers: Mapping[str, Sequence[int]],
    widths: Collection[int],
    group_size: GroupSize | None = None,
    symmetric: bool = True,
    layout: Layout = "packed",
) -> dict[Group, dict[int, int]]:
    """Bits that each group takes at each width.

    Args:
        layers: shapes [out, in].
        widths: bits of a weight; from 16 on it is stored as it is.
        group_size: inputs of a row that share a scale. None: weights alone are counted, so that a budget of B times
            their number is one of B bits on average.
        symmetric: no zero points.
        layout: see compression.quantization.packed; which one a model needs, compression.quantization.scheme says.
    """
    return {
        group: {
            bits: sum(layer_size(layers[layer], bits, group_size, symmetric, layout) for layer in group)
            for bits in widths
        }
        for group in groups
    }


def total_size(plan: Mapping[Group, int], sizes: Sizes) -> int:
    """What a plan takes, in the unit of `sizes`: the budget at which other plans are as large."""
    return sum(sizes[group][bits] for group, bits in plan.items())


def layer_size(
    shape: Sequence[int], bits: int, group_size: GroupSize | None, symmetric: bool, layout: Layout = "packed"
) -> int:
    """Bits that a layer of shape [out, in] takes; arguments as in `group_sizes`.

    With a group size, those of all its tensors in compressed-tensors' formats: the codes of a row, and packed zero
    points of a column of groups, are padded to whole words; scales and unpacked weights have 16 bits.
    """
    rows, width = shape
    if group_size is None or bits >= UNPACKED:
        return rows * width * bits
    spans = 1 if group_size == "tensor" else rows
    groups = width // group_size if isinstance(group_size, int) else 1
    packs_zeros = layout == "packed" and group_size != "tensor"
    zeros = groups * (_words(spans * bits) if packs_zeros else spans * BYTE)
    codes = rows * width * BYTE if layout == "bytes" else rows * _words(width * bits) + SHAPE
    return codes + spans * groups * SCALE + (0 if symmetric else zeros) + (GLOBAL_SCALE if layout == "loose" else 0)


def _words(bits: int) -> int:
    return ceil(bits / WORD) * WORD


# Rules that go by scores.


def uniform(groups: Iterable[Group], bits: int) -> Plan:
    """The same width for every group."""
    return dict.fromkeys(groups, bits)


def by_share(scores: Mapping[Group, float], share: float, bits: int, sensitive_bits: int) -> Plan:
    """The most sensitive `share` of the groups gets `sensitive_bits`, all others `bits`; see `by_percentile`."""
    return by_percentile(scores, {bits: 1 - share, sensitive_bits: share})


def by_percentile(scores: Mapping[Group, float], shares: Mapping[int, float]) -> Plan:
    """Groups ranked by sensitivity and cut into shares; the more sensitive, the wider.

    Args:
        shares: of the groups, by width, rounded to whole groups from the widest on; the narrowest width gets all that
            the others leave. Of equal scores the earlier group is the more sensitive.
    """
    _check_finite({group: [score] for group, score in scores.items()}, "scores")
    ranked = sorted(scores, key=lambda group: -scores[group])
    plan = dict.fromkeys(scores, min(shares))
    start, upto = 0, 0.0
    for bits in sorted(shares, reverse=True)[:-1]:
        upto += shares[bits]
        end = round(upto * len(ranked))
        plan |= dict.fromkeys(ranked[start:end], bits)
        start = end
    return plan


def by_kmeans(scores: Mapping[Group, float], widths: Collection[int]) -> Plan:
    """A width for each cluster of K-means on the scores, the widest for the most sensitive (CPTQuant, section 3).

    The clusters are the best there are: in one dimension each is an interval, so that the least sum of squares is found
    by dynamic programming (Wang and Song 2011). The released code runs a random start of Lloyd's iteration and hands
    out widths by the clusters' arbitrary numbers.

    Equal scores get equal bits. If there are fewer different scores than widths, the widest are not used.
    """
    _check_finite({group: [score] for group, score in scores.items()}, "scores")
    values, places, counts = np.unique(list(scores.values()), return_inverse=True, return_counts=True)
    starts = _kmeans(values, counts, min(len(widths), len(values)))
    clusters = np.searchsorted(starts, places, side="right") - 1
    return {group: sorted(widths)[cluster] for group, cluster in zip(scores, clusters.tolist(), strict=True)}


def _kmeans(values: NDArray[np.float64], counts: NDArray[np.intp], clusters: int) -> list[int]:
    """Where each of the best clusters of sorted values, each seen `counts` times, begins."""
    spread = _spreads(values, counts)
    least, starts = spread[0], []  # least sum of squares of the values up to each, in the clusters so far
    for _ in range(clusters - 1):
        totals = np.append(np.inf, least[:-1])[:, None] + spread  # [where the last cluster begins, where it ends]
        starts.append(totals.argmin(0))
        least = totals.min(0)
    found, end = [], len(values) - 1
    for first in reversed(starts):
        found.append(int(first[end]))
        end = found[-1] - 1
    return [0, *reversed(found)]


def _spreads(values: NDArray[np.float64], counts: NDArray[np.intp]) -> NDArray[np.float64]:
    """Sum of squares about their mean of values i to j [i, j], updated value by value (Welford); infinite for i > j."""
    spread = np.full((len(values), len(values)), np.inf)
    for i in range(len(values)):
        weight, mean, total = 0.0, 0.0, 0.0
        for j in range(i, len(values)):
            weight += counts[j]
            away = values[j] - mean
            mean += away * counts[j] / weight
            total += away * (values[j] - mean) * counts[j]
            spread[i, j] = total
    return spread


# Rules that go by costs and sizes.


def _silent(_: float) -> None:
    pass


def by_budget(costs: Costs, sizes: Sizes, budget: float, key: str = "quantize.budget", tell: Tell = _silent) -> Plan:
    """The least total cost within a total size; of equal costs the lesser size.

    Args:
        costs: the rise of the loss, say; of any sign. Their widths are the ones to choose from.
        sizes: of every group at these widths.
        budget: largest total size, in the unit of `sizes`.
        key: of params.yaml, for the message.
        tell: is called if the plan may not be the best: with how much better, at most, the best one is, in the unit of
            the costs; see compression.quantization.knapsack.

    Raises:
        Problem: even the smallest sizes exceed the budget.
    """
    return _choose(costs, costs, sizes, budget, key, tell)


def cheapest_under(
    costs: Costs, sizes: Sizes, ceiling: float, key: str = "quantize.ceiling", tell: Tell = _silent
) -> Plan:
    """The least total size within a total cost; of equal sizes the lesser cost. Arguments as in `by_budget`.

    Args:
        ceiling: largest total cost, kept to within the rounding of a sum. With costs in nats a token, log(1.05) is a
            perplexity that is predicted to rise by 5 %.
        tell: as in `by_budget`, in the unit of the sizes.

    Raises:
        Problem: even the least costs exceed the ceiling.
    """
    return _choose(costs, sizes, costs, ceiling, key, tell)


def _choose(costs: Costs, values: Numbers, weights: Numbers, limit: float, key: str, tell: Tell) -> Plan:
    """The least sum of values within a sum of weights."""
    _check_finite({group: own.values() for group, own in costs.items()}, "costs")
    widths = {group: sorted(own) for group, own in costs.items()}
    worth = [[values[group][bits] for bits in own] for group, own in widths.items()]
    weight = [[weights[group][bits] for bits in own] for group, own in widths.items()]
    try:
        chosen = least_choice(worth, weight, limit)
    except ValueError:
        raise _too_little(limit, sum(map(min, weight)), key) from None
    if chosen.gap > 0:
        tell(chosen.gap)
    return {group: own[place] for (group, own), place in zip(widths.items(), chosen.places, strict=True)}


def _too_little(limit: float, least: float, key: str) -> Problem:
    upward = ceil(least * 1e6) / 1e6
    return Problem(f"params.yaml: {key}", f"no plan keeps to {limit:.15g}", f"the least possible: {upward:.15g}")


# Rules to be compared with.


def head_tail(
    blocks: Mapping[str, int], sizes: Sizes, budget: float, low: int, high: int, key: str = "quantize.budget"
) -> Plan:
    """The first and the last blocks get `high` bits, all others `low`; as many of them as the budget allows.

    From both ends inwards, group by group: first block, last, second, last but one. A group that the rest of the
    budget does not widen is passed over for a smaller one further in.

    Args:
        blocks: block of each layer.
        sizes, budget, key: as in `by_budget`.

    Raises:
        Problem: `low` bits everywhere exceed the budget.
    """
    first, last = min(blocks.values()), max(blocks.values())
    plan = dict.fromkeys(sizes, low)
    left = _left(plan, sizes, budget, key)
    for group in sorted(sizes, key=lambda group: _depth(blocks[group[0]], first, last)):
        step = sizes[group][high] - sizes[group][low]
        if step <= left:
            plan[group] = high
            left -= step
    return plan


def _depth(block: int, first: int, last: int) -> tuple[int, int]:
    """Distance from the nearer end, then the block itself."""
    return min(block - first, last - block), block


def random_plan(sizes: Sizes, budget: float, seed: int, key: str = "quantize.budget") -> Plan:
    """Widths by lot: from the narrowest everywhere, groups drawn at random go up by one width while the budget lasts.

    Args:
        sizes, budget, key: as in `by_budget`; the widths of `sizes` are the ones to choose from.

    Raises:
        Problem: the narrowest widths exceed the budget.
    """
    draw = torch.Generator().manual_seed(seed)
    plan = {group: min(own) for group, own in sizes.items()}
    left = _left(plan, sizes, budget, key)
    wider = {group: sorted(own)[1:] for group, own in sizes.items()}
    live = [group for group in sizes if wider[group]]
    while live:
        place = int(torch.randint(len(live), (), generator=draw))
        group = live[place]
        step = sizes[group][wider[group][0]] - sizes[group][plan[group]]
        if step <= left:
            plan[group] = wider[group].pop(0)
            left -= step
        else:
            wider[group].clear()  # what does not fit now never will
        if not wider[group]:
            live.pop(place)
    return plan


def _left(plan: Plan, sizes: Sizes, budget: float, key: str) -> float:
    """What a plan leaves of the budget."""
    taken = total_size(plan, sizes)
    if taken > budget:
        raise _too_little(budget, taken, key)
    return budget - taken


def _check_finite(numbers: Mapping[Group, Iterable[float]], what: str) -> None:
    for group, own in numbers.items():
        if not all(map(isfinite, own)):
            raise Problem(" ".join(group), f"its {what} are not all finite numbers", "measure the sensitivities again")
