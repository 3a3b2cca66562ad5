"""Allocation in float64: the common shift by bisection, the global budget by sorting every score of the model."""

from collections.abc import Collection, Mapping

from torch import Tensor


def shares(
    wanted: Mapping[str, float],
    sizes: Mapping[str, int],
    target: float,
    low: float,
    high: float,
    dense: Collection[str],
) -> dict[str, float]:
    """Weights that each layer drops, not yet whole numbers."""

    def shifted(shift: float) -> dict[str, float]:
        return {
            layer: 0.0 if layer in dense else size * min(max(wanted[layer] + shift, low), high)
            for layer, size in sizes.items()
        }

    below, above = -10.0, 10.0
    for _ in range(200):
        middle = (below + above) / 2
        if sum(shifted(middle).values()) < target * sum(sizes.values()):
            below = middle
        else:
            above = middle
    return shifted(above)


def owl(ratios: list[list[float]], sizes: list[list[int]], target: float, spread: float) -> list[float]:
    """Sparsity of each block before the shift, from its layers' outlier ratios and sizes."""
    outliers = [
        sum(ratio * size for ratio, size in zip(*block, strict=True)) / sum(block[1])
        for block in zip(ratios, sizes, strict=True)
    ]
    kept = [(share - min(outliers)) / (max(outliers) - min(outliers)) * 2 * spread for share in outliers]
    return [target + spread - more for more in kept]


def global_counts(scores: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    """How many of each layer's scores are among the lowest of all; equal ones from earlier layers first."""
    ranked = sorted(
        (value, place, layer)
        for place, (layer, score) in enumerate(scores.items())
        for value in score.double().flatten().tolist()
    )
    counts = dict.fromkeys(scores, 0)
    for _, _, layer in ranked[:budget]:
        counts[layer] += 1
    return counts
