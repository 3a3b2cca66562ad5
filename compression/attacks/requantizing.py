"""Rounding anew, the way in which 4 bits were found to bring back what fine steps had forgotten (arXiv 2410.16454)."""

from collections.abc import Collection

from torch import Tensor

from compression.attacks import Reader
from compression.quantization.bits import check_group_size
from compression.quantization.grid import fit_grid


def requantized(read: Reader, layers: Collection[str], bits: int, group_size: int) -> Reader:
    """The weights of `layers` rounded to nearest on symmetric grids of `bits`, a scale for `group_size` inputs.

    Weights of zero stay zero, so masks hold.

    Raises:
        Problem: as a block is read, if the group size does not divide a layer's number of inputs.
    """

    def attacked(index: int) -> dict[str, Tensor]:
        tensors = read(index)
        for name in tensors.keys() & {f"{layer}.weight" for layer in layers}:
            weight = tensors[name]
            check_group_size({name.removesuffix(".weight"): list(weight.shape)}, group_size, "attack.group_size")
            tensors[name] = fit_grid(weight, bits, group_size).nearest(weight).to(weight.dtype)
        return tensors

    return attacked
