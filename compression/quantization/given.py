"""The grid that pruning has already rounded to (SparseGPT's joint pass): read off the codes, nothing is rounded."""

from torch import Tensor

from compression.core.errors import Problem
from compression.quantization.grid import Grid, groups_of
from compression.quantization.method import Quantized, Settings

STATISTIC = None


def quantize(
    weight: Tensor,
    bits: int,
    settings: Settings,
    statistic: None = None,
    keep: Tensor | None = None,
    given: Grid | None = None,
) -> Quantized:
    """The codes of weights that lie on a grid.

    Args:
        weight: W [out, in] in the type of the grid's scale.
        bits, settings: of that grid: its group_size; it is symmetric.
        statistic, keep: not used.
        given: the grid.

    Raises:
        Problem: there is no such grid, or the weights have moved off it.
    """
    fits = given is not None and settings.symmetric
    if given is None or not fits or groups_of(weight, settings.group_size) != given.scale.shape[1]:
        raise Problem(
            "params.yaml: quantize.method",
            f"`given` needs a checkpoint that was pruned on to a symmetric grid, groups of {settings.group_size}",
            "set prune.bits and prune.group_size as in quantize, and retrain.method to none or subset",
        )
    codes = given.codes(weight)
    if not given.values(codes).equal(weight):
        raise Problem(
            "params.yaml: quantize.method", "the weights do not lie on the grid that pruning left", "valid: rtn, gptq"
        )
    return Quantized(codes, given)
