"""Round to nearest, a group at a time."""

import numpy as np
import torch
from torch import Tensor


def rtn(weight: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes int8 [out, in], scales [out, groups] and values [out, in], the last two in the type of the weight."""
    rows, width = weight.shape
    codes = torch.zeros(rows, width, dtype=torch.int8)
    scales = torch.ones(rows, width // group_size, dtype=weight.dtype)
    values = torch.zeros_like(weight)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    for row in range(rows):
        for group in range(width // group_size):
            columns = range(group * group_size, (group + 1) * group_size)
            largest = max(abs(float(weight[row, column])) for column in columns)
            if largest > 0:
                scales[row, group] = largest / (2 ** (bits - 1) - 0.5)
            scale = np.float32(float(scales[row, group]))
            for column in columns:
                steps = np.float32(float(weight[row, column])) / scale
                code = min(max(round(float(steps)), low), high)
                codes[row, column] = code
                values[row, column] = code * float(scale)
    return codes, scales, values


def grid_of(weight: Tensor, bits: int, symmetric: bool, importance: Tensor | None = None) -> tuple[float, int]:
    """Scale and zero point for one group [n] in the type of the weights; shrunk where that errs least."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    found: list[tuple[float, float, int]] = []
    for step in range(11 if importance is not None else 1):
        span = 1 - step / 20
        least, most = min(0.0, float(weight.min())) * span, max(0.0, float(weight.max())) * span
        scale = max(-least, most) / (2 ** (bits - 1) - 0.5) if symmetric else (most - least) / (high - low)
        scale = float(torch.tensor(scale, dtype=weight.dtype)) or 1.0
        zero = 0 if symmetric else min(max(round(low - least / scale), low), high)
        error = 0.0
        for column, value in enumerate(weight.tolist()):
            code = min(max(round(value / scale) + zero, low), high)
            lost = value - float(torch.tensor((code - zero) * scale, dtype=weight.dtype))
            error += lost**2 * (1.0 if importance is None else float(importance[column]))
        found.append((error, scale, zero))
    best = min(found, key=lambda one: one[0])
    return best[1], best[2]


def gptq(
    weight: Tensor,
    H: Tensor,
    bits: int,
    group_size: int,
    symmetric: bool = True,
    clip: bool = False,
    by_activation: bool = False,
    keep: Tensor | None = None,
    ties_as: Tensor | None = None,
) -> Tensor:
    """Rounded weights float64 [out, in]: at each column the inverse of what is left of H, anew.

    Args:
        weight: float32 [out, in].
        H: float64 [in, in], damped; its diagonal weights the errors of a clip search.
        ties_as: rounded weights [out, in] to follow where a weight lies halfway between two values of the grid. The
            lowest weight of a group does so whenever it is also the largest: a symmetric grid ends half a step above.
    """
    rows, width = weight.shape
    keep = torch.ones(rows, width, dtype=torch.bool) if keep is None else keep
    dense = weight.double() * keep
    values, rounded = dense.clone(), torch.zeros(rows, width, dtype=torch.float64)
    norms = H.diagonal() - H.diagonal().mean() * 0.01 / 1.01  # without the damping, lambda = 0.01 of the mean
    order = sorted(range(width), key=lambda column: -float(norms[column])) if by_activation else list(range(width))
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    grids: dict[tuple[int, int], tuple[float, int]] = {}
    left = list(order)
    while left:
        column = left[0]
        group = column // group_size
        inverse = torch.linalg.inv(H[left][:, left])
        for row in range(rows):
            if (row, group) not in grids:
                part = slice(group * group_size, (group + 1) * group_size)
                source = dense if by_activation else values
                own = (source[row, part] * keep[row, part]).float()
                grids[row, group] = grid_of(own, bits, symmetric, norms[part] if clip else None)
            scale, zero = grids[row, group]
            value = float(values[row, column])
            if keep[row, column]:
                code = min(max(round(value / scale) + zero, low), high)
                rounded[row, column] = (code - zero) * scale
                if ties_as is not None:
                    other = float(ties_as[row, column])
                    if abs(other - value) <= abs(float(rounded[row, column]) - value) + 1e-3 * scale:
                        rounded[row, column] = other
            lost = value - float(rounded[row, column])
            values[row, left] -= lost * inverse[0] / inverse[0, 0]
        left = left[1:]
    return rounded
