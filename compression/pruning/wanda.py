"""Wanda: |W| times the norm of the input it meets (Sun et al. 2023, arXiv 2306.11695, eq. 1)."""

from torch import Tensor

from compression.pruning.method import Pruned, Settings
from compression.pruning.pattern import Pattern
from compression.pruning.select import keep_highest
from compression.statistics import Gram, InputNorms

STATISTIC = InputNorms
SCOPES = ("row", "layer", "adaptive")


def score(weight: Tensor, statistic: InputNorms | Gram) -> Tensor:
    """S_ij = |W_ij| * ||X_j||_2, float32 [out, in]."""
    return weight.abs().float() * statistic.norms()


def prune(weight: Tensor, statistic: InputNorms, pattern: Pattern, settings: Settings) -> Pruned:
    """Drops the lowest scores; the weights that stay are not changed.

    Args:
        weight: W [out, in], any floating type.
        statistic: norms of the layer's inputs X over the calibration tokens.
        pattern: what the mask has to satisfy; the paper compares within one output row, and its variant
            `adaptive` lets rows differ.
        settings: not used.
    """
    keep = keep_highest(score(weight, statistic), pattern)
    return Pruned(weight * keep, keep)
