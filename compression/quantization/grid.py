"""The symmetric grid of a weight matrix: integer codes times one scale a group of inputs."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """Values s * q for q in -2^(b-1) .. 2^(b-1) - 1.

    Attributes:
        bits: b, 2 to 8.
        scale: s [out, in / group_size], in the type in which it is stored; codes are always taken against the
            stored value, never against a finer one that the file does not hold.
    """

    bits: int
    scale: Tensor

    def codes(self, weight: Tensor) -> Tensor:
        """The nearest code of each weight [out, in], int8."""
        low, high = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        steps = self._grouped(weight).float() / self.scale[..., None].float()
        return steps.round_().clamp_(low, high).to(torch.int8).view(weight.shape)

    def values(self, codes: Tensor) -> Tensor:
        """The weights that codes [out, in] stand for, in the type of the scale, as compressed-tensors has them."""
        grouped = self._grouped(codes).to(self.scale.dtype)
        return (grouped * self.scale[..., None]).view(codes.shape)

    def _grouped(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(len(matrix), self.scale.shape[1], -1)


def spanning_scale(largest: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """max|W| / (2^(b-1) - 1/2) in the stored type: the scale whose grid spans weights of up to `largest`; 1 for 0."""
    scale = (largest / (2 ** (bits - 1) - 0.5)).to(dtype)
    return torch.where(scale > 0, scale, torch.ones_like(scale))
