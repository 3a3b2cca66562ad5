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
