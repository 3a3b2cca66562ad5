"""Wanda's mask, OBS update: the second row of Wanda's ablation (arXiv 2306.11695, section 5)."""

from torch import Tensor

from compression.pruning.method import Pruned, Settings
from compression.pruning.obs import prune_by_sweep
from compression.pruning.pattern import Pattern
from compression.pruning.select import keep_highest
from compression.pruning.wanda import score
from compression.statistics import Gram

STATISTIC = Gram
SCOPES = ("row", "layer")


def prune(weight: Tensor, statistic: Gram, pattern: Pattern, settings: Settings) -> Pruned:
    """Drops the lowest |W| * ||X|| and updates the weights that stay.

    Args:
        weight: W [out, in], any floating type.
        statistic: X^T X over the calibration tokens.
        pattern: what the mask has to satisfy.
        settings: choose (`layer` is the paper's sequential arm, `columns` its iterative one), damping, columns,
            bits, group_size.
    """
    norms = statistic.norms()
    keep = keep_highest(score(weight, statistic), pattern) if settings.choose == "layer" else None
    return prune_by_sweep(
        weight, statistic, pattern, settings, lambda values, inputs: values.abs() * norms[inputs], keep
    )
