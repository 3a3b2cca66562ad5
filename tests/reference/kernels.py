"""A linear layer from codes, a weight at a time."""

import torch
from torch import Tensor


def linear(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None) -> Tensor:
    """y float64 [N, out] of x [N, in], codes [out, in], and scales and zero points [out, groups], or [1, 1] for all."""
    outputs, inputs = codes.shape
    weight = torch.zeros(outputs, inputs, dtype=torch.float64)
    for row in range(outputs):
        for column in range(inputs):
            place = (min(row, len(scale) - 1), column * scale.shape[1] // inputs)
            shift = 0 if zero is None else int(zero[place])
            weight[row, column] = float(scale[place]) * (int(codes[row, column]) - shift)
    y = x.double() @ weight.T
    return y if bias is None else y + bias.double()
