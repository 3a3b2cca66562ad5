"""Round to nearest: the grid spans each group's largest weight, every weight goes to its nearest point."""

from torch import Tensor

from compression.quantization.grid import Grid, spanning_scale


def quantize(weight: Tensor, bits: int, group_size: int, given: Grid | None = None) -> tuple[Tensor, Grid]:
    """Rounds W to nearest on a symmetric grid.

    Args:
        weight: W [out, in]; in is a multiple of group_size.
        bits: b.
        group_size: inputs that share a scale.
        given: not used.

    Returns:
        codes int8 [out, in], and the grid, its scale max|W| / (2^(b-1) - 1/2) in the type of W. A group of
        nothing but zeros gets scale 1.
    """
    largest = weight.float().reshape(len(weight), -1, group_size).abs().amax(-1)
    grid = Grid(bits, spanning_scale(largest, bits, weight.dtype))
    return grid.codes(weight), grid
