"""Magnitude pruning: the smallest |W| go (Han et al. 2015, arXiv 1506.02626)."""

import torch
from torch import Tensor

from compression.pruning.method import Pruned, Settings
from compression.pruning.pattern import Pattern
from compression.pruning.select import keep_highest

STATISTIC = None
SCOPES = ("layer", "row")


def prune(weight: Tensor, statistic: None, pattern: Pattern, settings: Settings) -> Pruned:
    """Drops the smallest absolute values.

    Args:
        weight: W [out, in], any floating type.
        statistic: not used.
        pattern: what the mask has to satisfy.
        settings: `before`, in iterative pruning: the mask so far.
    """
    score = weight.abs().float()
    if settings.before is None:
        keep = keep_highest(score, pattern)
    else:
        before = settings.before.to(score.device)
        # Where the pattern drops less than the mask so far did, be it by rounding, that mask stands.
        keep = keep_highest(torch.where(before, score, -1.0), pattern) & before
    return Pruned(weight * keep, keep)
