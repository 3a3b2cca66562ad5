"""How many weights each layer drops: a rule says which sparsities it would like, `project` makes the sum exact."""

import math
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Mapping
from fractions import Fraction

import torch
from torch import Tensor

from compression.core.errors import Problem
from compression.pruning.pattern import NofM, Pattern, Structured, Unstructured

HALF = 16  # bits of a float32 score that each pass of `global_counts` looks at


def project(
    wanted: Mapping[str, float],
    sizes: Mapping[str, int],
    target: float,
    low: float,
    high: float,
    dense: Collection[str],
) -> dict[str, int]:
    """The sparsities that are wanted, all shifted by the same amount so that the budget is met to the weight.

    Args:
        wanted: sparsity by layer, any numbers; those of dense layers are not looked at.
        sizes: number of weights of every layer.
        target: share of all weights, those of dense layers included, that go.
        low, high: bounds on the sparsity of every layer that is not dense.
        dense: layers that drop nothing.

    Returns:
        number of weights that each layer drops, in the order of `sizes`; the sum is round(target * all weights).
        What the shift leaves of broken weights goes to the largest remainders, ties to the earlier layer.

    Raises:
        Problem: the bounds and the dense layers leave no way to reach the target.
    """
    budget = reachable_budget(sizes, target, low, high, dense)
    return project_within(wanted, sizes, budget, bounds(sizes, low, high, dense))


def project_within(
    wanted: Mapping[str, float], sizes: Mapping[str, int], budget: int, bounds: Mapping[str, tuple[int, int]]
) -> dict[str, int]:
    """As `project`, with a budget in weights and, for each layer that may drop any, the fewest and the most.

    The budget has to lie between the sums of both.
    """
    wishes = {layer: Fraction(wanted[layer]) for layer in bounds}

    def shares(shift: Fraction) -> dict[str, Fraction]:
        return {
            layer: min(max(sizes[layer] * (wishes[layer] + shift), Fraction(least)), Fraction(most))
            for layer, (least, most) in bounds.items()
        }

    def total(shift: Fraction) -> Fraction:
        return sum(shares(shift).values(), Fraction(0))

    # The total grows with the shift, and is a straight line between two shifts at which a layer meets a bound.
    kinks = sorted(
        Fraction(bound, sizes[layer]) - wishes[layer] for layer, both in bounds.items() for bound in set(both)
    )
    place = bisect_left(kinks, Fraction(budget), key=total)
    shift = kinks[place] if kinks else Fraction(0)
    if place and total(shift) != budget:
        before = kinks[place - 1]
        shift = before + (budget - total(before)) / (total(shift) - total(before)) * (shift - before)

    exact = shares(shift)
    dropped = {layer: math.floor(exact.get(layer, 0)) for layer in sizes}
    ranked = sorted(exact, key=lambda layer: dropped[layer] - exact[layer])
    for layer in ranked[: budget - sum(dropped.values())]:
        dropped[layer] += 1
    return dropped


def reachable_budget(sizes: Mapping[str, int], target: float, low: float, high: float, dense: Collection[str]) -> int:
    """round(target * all weights); arguments and Problem as in `project`."""
    both = bounds(sizes, low, high, dense).values()
    least, most, total = sum(few for few, _ in both), sum(many for _, many in both), sum(sizes.values())
    budget = round(target * total)
    if not least <= budget <= most:
        kept = f" with {len(set(dense) & set(sizes))} of {len(sizes)} layers dense" if dense else ""
        lowest, highest = math.ceil(1e4 * least / total) / 1e4, math.floor(1e4 * most / total) / 1e4
        raise Problem(
            "params.yaml: prune.sparsity",
            f"{target:g} cannot be reached with allocate.low {low:g} and allocate.high {high:g}{kept}",
            f"what can be reached: {lowest:g} to {highest:g}",
        )
    return budget


def bounds(sizes: Mapping[str, int], low: float, high: float, dense: Collection[str]) -> dict[str, tuple[int, int]]:
    """Fewest and most weights that each layer that is not dense may drop.

    Where no whole number lies between a layer's bounds, the whole numbers on either side of them are its bounds.
    """
    least, most = Fraction(str(low)), Fraction(str(high))  # the decimals as written: 0.29 of 100 weights is 29
    found = {}
    for layer, size in sizes.items():
        if layer not in dense:
            few, many = math.ceil(least * size), math.floor(most * size)
            found[layer] = (few, many) if few <= many else (many, few)
    return found


def uniform(sizes: Mapping[str, int], target: float) -> dict[str, float]:
    """The same sparsity for every layer."""
    return dict.fromkeys(sizes, target)


def owl(
    ratios: Mapping[str, float], sizes: Mapping[str, int], blocks: Mapping[str, int], target: float, spread: float
) -> dict[str, float]:
    """OWL: the more outliers, the less sparsity (Yin et al. 2023, arXiv 2310.05175, section 4).

    All layers of a block share a sparsity, as in the paper, whose layerwise outlier ratio D is that of a whole block.
    Here D of a block is the mean of its layers' ratios weighted by their weights: outliers are counted against each
    layer's own mean, where the paper's code counts them against the mean of the whole block.

    Args:
        ratios: share of outliers by layer.
        sizes: number of weights by layer.
        blocks: block of each layer.
        target: S, the sparsity that is wanted on the whole.
        spread: lambda; sparsities lie within S - lambda and S + lambda until `project` shifts them all alike.
    """
    outliers: dict[int, float] = {}
    weights: dict[int, int] = {}
    for layer, block in blocks.items():
        outliers[block] = outliers.get(block, 0.0) + ratios[layer] * sizes[layer]
        weights[block] = weights.get(block, 0) + sizes[layer]
    return by_block({block: outliers[block] / weights[block] for block in weights}, blocks, target, spread)


def by_block(scores: Mapping[int, float], blocks: Mapping[str, int], target: float, spread: float) -> dict[str, float]:
    """The more sensitive a block, the less sparsity: straight from target + spread down to target - spread.

    Rule `pmpq` by the loss increase of each block (compression.sensitivity.pmpq), rule `owl` by its outlier ratio.

    Args:
        scores: of each block; larger is more sensitive. If all are equal, every layer gets the target.
        blocks: block of each layer.
    """
    lowest, highest = min(scores.values()), max(scores.values())
    width = highest - lowest
    return {
        layer: target + spread * (1 - 2 * (scores[block] - lowest) / width) if width > 0 else target
        for layer, block in blocks.items()
    }


def global_counts(scores: Callable[[], Iterable[tuple[str, Tensor]]], budget: int) -> dict[str, int]:
    """One budget for all: the lowest scores go, wherever they are.

    Exact in two passes, with one layer in memory. The bits of a float that is not negative, read as a whole number,
    keep its order: the first pass counts by the high bits and finds those of the threshold, the second tells apart by
    the low bits what shares them.

    Args:
        scores: called once a pass; gives (layer, float32 of any shape, not negative), the layers in the same order.
        budget: how many weights go in all; at most as many as there are.

    Returns:
        how many of each layer's scores are among the lowest; equal scores go from earlier layers first.
    """
    histogram = torch.zeros(1 << HALF, dtype=torch.int64)
    for _, score in scores():
        histogram += torch.bincount(_bits(score) >> HALF, minlength=1 << HALF)
    top, below = _bin(histogram, budget)

    counts: dict[str, int] = {}
    edges: dict[str, tuple[Tensor, Tensor]] = {}  # low bits of the layer's scores in the threshold's bin, how often
    histogram.zero_()
    for layer, score in scores():
        bits = _bits(score)
        high = bits >> HALF
        counts[layer] = int((high < top).count_nonzero())
        values, seen = (bits[high == top] & ((1 << HALF) - 1)).unique(return_counts=True)
        histogram.index_add_(0, values, seen)
        edges[layer] = values, seen
    last, lower = _bin(histogram, budget - below)

    missing = budget - below - lower
    for layer, (values, seen) in edges.items():
        tied = min(missing, int(seen[values == last].sum()))
        counts[layer] += int(seen[values < last].sum()) + tied
        missing -= tied
    return counts


def _bits(score: Tensor) -> Tensor:
    return score.contiguous().view(-1).view(torch.int32)


def _bin(histogram: Tensor, rank: int) -> tuple[int, int]:
    """The bin in which the rank-th entry lies, counted from one, and how many entries lie in the bins before it."""
    upto = histogram.cumsum(0)
    place = int(torch.searchsorted(upto, rank))
    return place, int(upto[place] - histogram[place])


def nofm_counts(sizes: Mapping[str, int], pattern: NofM, dense: Collection[str]) -> dict[str, int]:
    """Number of weights that each layer drops under N:M: its share exactly, or none where it is dense."""
    return {
        layer: 0 if layer in dense else size * (pattern.of - pattern.keep) // pattern.of
        for layer, size in sizes.items()
    }


def check_rule(rule: str, pattern: Pattern | Structured) -> None:
    """Raises Problem when the rule would give layers other sparsities than the one that N:M has."""
    if isinstance(pattern, NofM) and rule != "uniform":
        raise Problem(
            "params.yaml: allocate.rule",
            f"`{rule}` gives layers different sparsities, but {pattern.keep}:{pattern.of} has only one",
            "valid: uniform; or set prune.pattern to unstructured",
        )


def layer_pattern(pattern: Pattern, dropped: int, weights: int) -> Pattern:
    """The pattern of one layer, which drops `dropped` of its `weights`.

    Raises:
        Problem: the pattern cannot drop just so many.
    """
    if isinstance(pattern, Unstructured):
        own: Pattern = Unstructured(dropped / weights, pattern.scope)
    else:
        own = pattern if dropped else Unstructured(0.0)
    if round(own.sparsity * weights) != dropped:
        raise Problem(str(own), f"cannot drop {dropped} of {weights} weights", "run stage allocate again")
    return own
