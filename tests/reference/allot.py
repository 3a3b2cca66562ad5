"""Allotting coupled structures by trying every pair of counts, and by looking at all that is left before each step."""

from collections.abc import Mapping, Sequence
from itertools import product

Key = tuple[int, str]


def same(
    costs: Mapping[Key, list[float]],
    weights: Mapping[Key, int],
    counts: Mapping[str, Sequence[int]],
    budget: int,
) -> dict[str, int] | None:
    """How many of each kind stay in every block; None if so much cannot go."""
    kinds = sorted({kind for _, kind in costs})
    best: tuple[float, int] | None = None
    answer = None
    for choice in product(*(counts[kind] for kind in kinds)):
        stay = dict(zip(kinds, choice, strict=True))
        gone = sum((len(cost) - stay[key[1]]) * weights[key] for key, cost in costs.items())
        total = sum(sum(sorted(cost)[: len(cost) - stay[key[1]]]) for key, cost in costs.items())
        if gone >= budget and (best is None or (total, gone) < best):
            best, answer = (total, gone), stay
    return answer


def threshold(
    costs: Mapping[Key, list[float]],
    weights: Mapping[Key, int],
    counts: Mapping[str, Sequence[int]],
    budget: int,
) -> dict[Key, set[int]] | None:
    """What stays in each block; None if so much cannot go."""
    stays = {key: set(range(len(cost))) for key, cost in costs.items()}
    gone = 0
    while gone < budget:
        open_ones = [
            (costs[key][number] / weights[key], place, number, key)
            for place, key in enumerate(costs)
            if len(stays[key]) > min(counts[key[1]])
            for number in stays[key]
        ]
        if not open_ones:
            return None
        _, _, number, key = min(open_ones)
        stays[key].remove(number)
        gone += weights[key]
    return stays
