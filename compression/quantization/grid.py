"""The grid of a weight matrix: integer codes, one scale a group of inputs, and a zero point where it is asymmetric."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

GroupSize = int | Literal["row", "tensor"]  # inputs of a row that share a scale; or all of them; or the whole matrix

SHRINKS = [1 - step / 20 for step in range(11)]  # what a clip search tries: the grid spans so much of the weights


@dataclass(frozen=True)
class Grid:
    """Values s * (q - z) for q in -2^(b-1) .. 2^(b-1) - 1. Zero is always one of them.

    Attributes:
        bits: b, 2 to 8.
        scale: s [out, groups], or [1, 1] for the whole matrix, in the type in which it is stored; codes are always
            taken against the stored value, never against a finer one that the file does not hold.
        zero: z, int8, shaped like the scale, a code itself; None: 0.
    """

    bits: int
    scale: Tensor
    zero: Tensor | None = None

    def codes(self, weight: Tensor) -> Tensor:
        """The nearest code of each weight [out, in], int8."""
        low, high = ends(self.bits)
        steps = self._grouped(weight).float() / self.scale[..., None].float()
        if self.zero is not None:
            steps += self.zero[..., None]
        return steps.round_().clamp_(low, high).to(torch.int8).view(weight.shape)

    def values(self, codes: Tensor) -> Tensor:
        """The weights that codes [out, in] stand for, in the type of the scale, as compressed-tensors has them."""
        grouped = self._grouped(codes).to(self.scale.dtype)
        if self.zero is not None:
            grouped = grouped - self.zero[..., None].to(grouped.dtype)
        return (grouped * self.scale[..., None]).view(codes.shape)

    def nearest(self, weight: Tensor) -> Tensor:
        """The values nearest to weights [out, in], in the type of the scale."""
        return self.values(self.codes(weight))

    def zeros(self, codes: Tensor) -> Tensor:
        """Which codes [out, in] stand for zero, bool."""
        grouped = self._grouped(codes)
        return (grouped == (0 if self.zero is None else self.zero[..., None])).view(codes.shape)

    def to(self, device: torch.device | str) -> "Grid":
        return Grid(self.bits, self.scale.to(device), None if self.zero is None else self.zero.to(device))

    def _grouped(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(len(matrix), self.scale.shape[1], -1)


def ends(bits: int) -> tuple[int, int]:
    """The lowest and the highest code."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def spanning_scale(largest: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """max|W| / (2^(b-1) - 1/2) in the stored type: the scale whose grid spans weights of up to `largest`; 1 for 0."""
    scale = (largest / (2 ** (bits - 1) - 0.5)).to(dtype)
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def spanning_grid(low: Tensor, high: Tensor, bits: int, symmetric: bool, dtype: torch.dtype) -> Grid:
    """The grid whose steps span low .. high, both float32 like the scale, low <= 0 <= high."""
    if symmetric:
        return Grid(bits, spanning_scale(torch.maximum(-low, high), bits, dtype))
    lowest, highest = ends(bits)
    scale = ((high - low) / (highest - lowest)).to(dtype)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero = (lowest - low / scale.float()).round_().clamp_(lowest, highest).to(torch.int8)
    return Grid(bits, scale, zero)


def fit_grid(
    weight: Tensor,
    bits: int,
    group_size: GroupSize,
    symmetric: bool = True,
    importance: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Grid:
    """The grid that spans each group of W; or, given the inputs' importance, the one on which W errs least.

    Args:
        weight: W [out, in].
        group_size: must divide in.
        importance: of each input [in], the diagonal of X^T X say: spans are then shrunk as far as it lowers
            sum_j importance_j (W_ij - Q(W_ij))^2 within a group. None: no clipping.
        dtype: in which scales are stored; that of W.
    """
    grouped = weight.float().reshape(len(weight), groups_of(weight, group_size), -1)
    low, high = grouped.amin(-1).clamp_(max=0), grouped.amax(-1).clamp_(min=0)
    if group_size == "tensor":
        low, high = low.amin().view(1, 1), high.amax().view(1, 1)
    grids = (spanning_grid(low * s, high * s, bits, symmetric, dtype or weight.dtype) for s in SHRINKS)
    return next(grids) if importance is None else _best(weight, grids, importance)


def groups_of(weight: Tensor, group_size: GroupSize) -> int:
    """How many groups a row has."""
    return weight.shape[1] // group_size if isinstance(group_size, int) else 1


def _best(weight: Tensor, grids: Iterator[Grid], importance: Tensor) -> Grid:
    """Group by group the one of the grids on which W [out, in] errs least; the first of those that err alike."""
    best, least = next(grids), torch.empty(0)
    for grid in (best, *grids):
        error = (grid.nearest(weight).float() - weight.float()).square_().mul_(importance)
        error = error.reshape(len(weight), grid.scale.shape[1], -1).sum(-1)
        if grid.scale.numel() == 1:
            error = error.sum().view(1, 1)
        if grid is best:
            least = error
            continue
        better = error < least
        least = torch.where(better, error, least)
        scale = torch.where(better, grid.scale, best.scale)
        zero = None if grid.zero is None or best.zero is None else torch.where(better, grid.zero, best.zero)
        best = Grid(grid.bits, scale, zero)
    return best
