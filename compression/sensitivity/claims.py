"""What may be claimed of sensitivities: that two measures agree, and that outer blocks suffer more than inner ones."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from compression.core.errors import Problem

Floats = NDArray[np.float64]


def spearman(
    a: Sequence[float], b: Sequence[float], seed: int, resamples: int = 2000, level: float = 0.95
) -> tuple[float, float, float]:
    """Rank correlation of two measures over the same layers, with its bootstrap interval (Spearman 1904, Efron 1979).

    Equal numbers share their mean rank.

    Args:
        a, b: scores, layer by layer.
        resamples: how often as many layers are drawn anew, with replacement; those in which a measure is constant
            have no correlation and do not count.
        level: share of the resamples that lies in the interval, as much left out below as above.

    Returns:
        (rho, low, high), all in [-1, 1]; nan if one of the measures is constant.

    Raises:
        Problem: a score is not a finite number.
    """
    x, y = _finite(list(zip(a, b, strict=True))).T
    draws = np.random.default_rng(seed).integers(len(x), size=(resamples, len(x)))
    found = np.array([_rank_correlation(x[draw], y[draw]) for draw in draws])
    if np.isnan(found).all():
        return np.nan, np.nan, np.nan
    low, high = np.nanquantile(found, [(1 - level) / 2, (1 + level) / 2])
    return _rank_correlation(x, y), float(low), float(high)


def outer_blocks_test(
    scores: Mapping[int, float], seed: int, share: float = 0.3, permutations: int = 10000
) -> tuple[float, float, float]:
    """Tests whether the first and last `share` of the blocks are more sensitive than those between (CPTQuant's claim).

    A one-sided permutation test on the difference of means (Fisher 1935, Pitman 1937): how often would blocks drawn at
    random differ from the others as much as the outer ones do?

    Args:
        scores: by block; larger is more sensitive.
        share: at each end, in (0, 0.5), rounded to whole blocks.
        permutations: how many draws.

    Returns:
        (mean of the outer blocks, mean of the middle ones, p). p counts the blocks as they lie as one more draw
        (Phipson and Smyth 2010), so that it is never 0.

    Raises:
        Problem: a score is not a finite number, or there are too few blocks for outer and middle ones.
    """
    values = _finite([scores[block] for block in sorted(scores)])
    ends = round(share * len(values))
    if not 0 < 2 * ends < len(values):
        raise Problem(
            "the outer blocks",
            f"{share:g} of {len(values)} blocks at each end leaves none to compare",
            "a share between 0 and 0.5 that is one block at least",
        )
    outer, middle = np.concatenate([values[:ends], values[-ends:]]), values[ends:-ends]
    drawn = np.random.default_rng(seed).permuted(np.tile(values, (permutations, 1)), axis=1)[:, : 2 * ends]
    rounding = 1e-12 * np.abs(values).sum()  # equal sums may differ by it
    as_large = int((drawn.sum(axis=1) >= outer.sum() - rounding).sum())
    return float(outer.mean()), float(middle.mean()), (1 + as_large) / (1 + permutations)


def _rank_correlation(x: Floats, y: Floats) -> float:
    """Pearson's correlation of the ranks; nan if all of x or all of y are equal."""
    a, b = _ranks(x), _ranks(y)
    a, b = a - a.mean(), b - b.mean()
    scale = np.sqrt((a @ a) * (b @ b))
    return float(np.clip(a @ b / scale, -1, 1)) if scale else np.nan


def _ranks(values: Floats) -> Floats:
    """Places in ascending order, from 1; equal values share the mean of theirs."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Floats = (counts.cumsum() - (counts - 1) / 2)[places]
    return ranks


def _finite(scores: Sequence[float | tuple[float, float]]) -> Floats:
    values = np.array(scores, dtype=np.float64)
    if not np.isfinite(values).all():
        raise Problem("the sensitivities", "not all of them are finite numbers", "measure them again")
    return values
