"""Plans the obvious way: every plan there is, every way to cut, layer by layer."""

from collections.abc import Collection, Iterator, Mapping
from itertools import combinations, pairwise, product
from math import fsum

Group = tuple[str, ...]


def every_plan(widths: Mapping[Group, Collection[int]]) -> Iterator[dict[Group, int]]:
    """All there are; `widths` of each group to choose from."""
    for choice in product(*widths.values()):
        yield dict(zip(widths, choice, strict=True))


def total(numbers: Mapping[Group, Mapping[int, float]], plan: Mapping[Group, int]) -> float:
    return fsum(numbers[group][bits] for group, bits in plan.items())


def least(
    values: Mapping[Group, Mapping[int, float]], weights: Mapping[Group, Mapping[int, float]], limit: float
) -> tuple[float, float] | None:
    """(value, weight) of the best plan of all within the limit, the lighter one of equals; None if there is none."""
    plans = [plan for plan in every_plan(values) if total(weights, plan) <= limit]
    return min(((total(values, plan), total(weights, plan)) for plan in plans), default=None)


def kmeans_error(values: list[float], clusters: int) -> float:
    """Least sum of squares of all ways to cut the sorted values into so many clusters, none of them empty."""
    ordered = sorted(values)
    cuts = combinations(range(1, len(ordered)), clusters - 1)
    return min(sum_of_squares(ordered, [0, *cut, len(ordered)]) for cut in cuts)


def sum_of_squares(ordered: list[float], cuts: list[int]) -> float:
    """Of the values about the mean of their cluster."""
    error = 0.0
    for start, end in pairwise(cuts):
        cluster = ordered[start:end]
        mean = fsum(cluster) / len(cluster)
        error += fsum((value - mean) ** 2 for value in cluster)
    return error


def percentile(scores: Mapping[Group, float], shares: Mapping[int, float]) -> dict[Group, int]:
    """Rank by rank: the widest width whose share, with those of the wider ones, reaches down to this rank."""
    groups, plan = list(scores), {}
    for place, group in enumerate(groups):
        rank = sum(scores[other] > scores[group] for other in groups)
        rank += sum(scores[other] == scores[group] for other in groups[:place])
        for bits in sorted(shares, reverse=True):
            if bits == min(shares) or rank < round(sum(shares[own] for own in shares if own >= bits) * len(groups)):
                plan[group] = bits
                break
    return plan
