"""Round to nearest: every weight goes to the nearest point of its group's grid."""

from torch import Tensor

from compression.quantization.grid import Grid, fit_grid
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
    """Rounds W to nearest.

    Args:
        weight: W [out, in]; the group size divides in.
        bits: b.
        settings: group_size, symmetric, clip: whether each group's span is shrunk as far as it lowers the sum of
            its squared errors.
        statistic, keep, given: not used; zero is on every grid.
    """
    importance = weight.new_ones(weight.shape[1]).float() if settings.clip else None
    grid = fit_grid(weight, bits, settings.group_size, settings.symmetric, importance)
    return Quantized(grid.codes(weight), grid)
