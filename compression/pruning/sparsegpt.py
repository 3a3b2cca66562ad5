"""SparseGPT: columns are pruned from left to right, and what each loses is made up for in those behind it.

Frantar and Alistarh 2023, arXiv 2301.00774, algorithm 1. The mask of a block of columns is chosen when its turn
comes, by what dropping a weight costs then: W_ij^2 / U_jj^2, U the upper Cholesky factor of H^-1.
"""

from torch import Tensor

from compression.pruning.method import Pruned, Settings
from compression.pruning.obs import prune_by_sweep
from compression.pruning.pattern import Pattern
from compression.statistics import Gram

STATISTIC = Gram
SCOPES = ("columns",)


def prune(weight: Tensor, statistic: Gram, pattern: Pattern, settings: Settings) -> Pruned:
    """Drops the weights that cost least, and updates those that stay.

    Args:
        weight: W [out, in], any floating type.
        statistic: X^T X over the calibration tokens.
        pattern: unstructured counts are exact within each block of columns, over all rows; N:M in each group.
        settings: damping, columns, bits, group_size.

    Raises:
        Problem: H cannot be factored, however much it is damped.
    """
    factor = statistic.factor(settings.damping)
    costs = factor.upper.diagonal().square()
    return prune_by_sweep(weight, statistic, pattern, settings, lambda values, inputs: values.square() / costs[inputs])
