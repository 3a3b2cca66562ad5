"""Outlier ratio: the share of a layer's entries that tower above its mean (OWL, arXiv 2310.05175, eq. 1)."""

from torch import Tensor


def outlier_ratio(weight: Tensor, norms: Tensor, threshold: float) -> float:
    """Share of entries with |W_ij| * ||X_j||_2 above `threshold` times the layer's mean.

    Args:
        weight: W [out, in].
        norms: ||X_j||_2, float32 [in].
        threshold: M of the paper, which uses 3 to 10.
    """
    score = weight.abs().float() * norms
    return float((score > threshold * score.mean()).double().mean())
