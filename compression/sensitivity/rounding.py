"""The grid that a layer is tried on: symmetric, round to nearest, no clipping; better quantisers only cost less."""

from torch import Tensor

from compression.quantization.bits import check_group_size
from compression.quantization.grid import fit_grid


def rounded(layer: str, weight: Tensor, bits: int, group_size: int) -> Tensor:
    """Q_b(W) [out, in] in the type of W [out, in].

    Raises:
        Problem: the group size does not divide the layer's number of inputs.
    """
    check_group_size({layer: list(weight.shape)}, group_size, "sensitivity.group_size")
    return fit_grid(weight, bits, group_size).nearest(weight)


def cost(bits: int) -> str:
    """Name of the column that says what rounding to so many bits costs."""
    return f"cost_{bits}"
