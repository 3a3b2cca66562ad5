"""Magnitude pruning: the smallest |W| go (Han et al. 2015, arXiv 1506.02626)."""

from torch import Tensor

from compression.pruning.pattern import Pattern
from compression.pruning.select import keep_highest

STATISTIC = None


def prune(weight: Tensor, statistic: None, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Drops the smallest absolute values.

    Args:
        weight: W [out, in], any floating type.
        statistic: not used.
        pattern: what the mask has to satisfy.

    Returns:
        W with the dropped entries at zero, and the mask bool [out, in].
    """
    keep = keep_highest(weight.abs().float(), pattern)
    return weight * keep, keep
