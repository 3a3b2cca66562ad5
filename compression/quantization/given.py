"""The grid that pruning has already rounded to (SparseGPT's joint pass): read off the codes, nothing is rounded."""

from torch import Tensor

from compression.core.errors import Problem
from compression.quantization.grid import Grid


def quantize(weight: Tensor, bits: int, group_size: int, given: Grid | None = None) -> tuple[Tensor, Grid]:
    """The codes of weights that lie on a grid.

    Args:
        weight: W [out, in] in the type of the grid's scale.
        bits, group_size: of that grid.
        given: the grid.

    Returns:
        codes int8 [out, in], and the grid.

    Raises:
        Problem: there is no such grid, or the weights have moved off it.
    """
    if given is None or given.bits != bits or weight.shape[1] != given.scale.shape[1] * group_size:
        raise Problem(
            "params.yaml: quantize.method",
            f"`given` needs a checkpoint that was pruned on to a grid of {bits} bits and groups of {group_size}",
            "set prune.bits and prune.group_size alike, and retrain.method to none or subset",
        )
    codes = given.codes(weight)
    if not given.values(codes).equal(weight):
        raise Problem(
            "params.yaml: quantize.method", "the weights do not lie on the grid that pruning left", "valid: rtn"
        )
    return codes, given
