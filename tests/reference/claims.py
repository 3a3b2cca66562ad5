"""Rank correlation by counting, its interval resample by resample; the permutation test over every split there is."""

from collections.abc import Sequence
from itertools import combinations
from math import isnan, nan, sqrt

import numpy as np


def ranks(values: Sequence[float]) -> list[float]:
    """How many are smaller, and half of the others that are equal, from 1."""
    return [
        1 + sum(other < own for other in values) + (sum(other == own for other in values) - 1) / 2 for own in values
    ]


def correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Pearson's; nan for constants."""
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    together = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    alone = sum((x - mean_a) ** 2 for x in a) * sum((y - mean_b) ** 2 for y in b)
    return together / sqrt(alone) if alone else nan


def spearman(a: Sequence[float], b: Sequence[float], seed: int, resamples: int) -> tuple[float, float, float]:
    """With the 95 % interval: a quantile lies between two of the sorted correlations, as far along as it should be."""
    found = []
    for draw in np.random.default_rng(seed).integers(len(a), size=(resamples, len(a))).tolist():
        rho = correlation(ranks([a[place] for place in draw]), ranks([b[place] for place in draw]))
        if not isnan(rho):
            found.append(rho)
    found.sort()
    ends = []
    for part in (0.025, 0.975):
        place = part * (len(found) - 1)
        below = int(place)
        above = min(below + 1, len(found) - 1)
        ends.append(found[below] + (place - below) * (found[above] - found[below]))
    return correlation(ranks(a), ranks(b)), ends[0], ends[1]


def exact_p(scores: Sequence[float], ends: int) -> float:
    """Of all ways to call 2 * ends blocks the outer ones, the share whose mean is at least that of the real ones."""
    real = sum(scores[:ends]) + sum(scores[-ends:])
    sums = [sum(scores[place] for place in chosen) for chosen in combinations(range(len(scores)), 2 * ends)]
    return sum(own >= real - 1e-9 for own in sums) / len(sums)
