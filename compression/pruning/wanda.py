"""Wanda: |W| times the norm of the input it meets (Sun et al. 2023, arXiv 2306.11695, eq. 1)."""

from torch import Tensor

from compression.pruning.pattern import Pattern
from compression.pruning.select import keep_highest
from compression.statistics import InputNorms

STATISTIC = InputNorms


def prune(weight: Tensor, statistic: InputNorms, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Drops the lowest scores S_ij = |W_ij| * ||X_j||_2; the weights that stay are not changed.

    Args:
        weight: W [out, in], any floating type.
        statistic: norms of the layer's inputs X over the calibration tokens.
        pattern: what the mask has to satisfy; the paper compares within one output row.

    Returns:
        W with the dropped entries at zero, and the mask bool [out, in].
    """
    keep = keep_highest(weight.abs().float() * statistic.norms(), pattern)
    return weight * keep, keep
