"""Weights as the bytes of a GGUF file: the codes and scales of a grid as they are, never rounded anew.

A quantised type holds blocks of 32 inputs, each with a scale d in float16:

    Q4_0   d (q - 8)     18 bytes a block
    Q4_1   d q + m       20, the offset m in float16
    Q5_0   d (q - 16)    22
    Q8_0   d q           34

A value s (q - z) of our grids is d = s times a whole number. Without a zero point it has b bits; with one, b + 1, or 4
bits and an offset m = -s (z + 8), which float16 may round. So only a dense layer gets Q4_1: in a sparse one s z + m
would no longer be zero.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray
from torch import Tensor

from compression.quantization.grid import Grid, ends

BLOCK = 32
PLAIN = {
    torch.float32: GGMLQuantizationType.F32,
    torch.float16: GGMLQuantizationType.F16,
    torch.bfloat16: GGMLQuantizationType.BF16,
}


@dataclass(frozen=True)
class Layout:
    """How the file holds a tensor.

    Attributes:
        type: of its values.
        shape: of the tensor, not of its bytes.
        widened: why a weight on a grid is stored in full precision; empty where it is not.
        rounding: by how much of a step of its grid an offset was rounded at most.
    """

    type: Any
    shape: tuple[int, ...]
    widened: str = ""
    rounding: float = 0.0

    @property
    def nbytes(self) -> int:
        block, size = GGML_QUANT_SIZES[self.type]
        return math.prod(self.shape) // block * int(size)


Encode = Callable[[], NDArray[np.uint8]]  # makes the bytes [rows, bytes a row] when they are asked for


def plain(tensor: Tensor, widened: str = "") -> tuple[Layout, Encode]:
    """A tensor in its own type; vectors (norms, biases) in float32, as llama.cpp adds and multiplies them."""
    tensor = tensor.float() if tensor.ndim == 1 else tensor
    return Layout(PLAIN[tensor.dtype], tuple(tensor.shape), widened), lambda: _bytes(tensor).numpy()


def on_grid(codes: Tensor, grid: Grid, dense: bool) -> tuple[Layout, Encode]:
    """A weight on a grid, in the smallest type that holds its very values; in full precision where none does.

    Args:
        codes: int8 [out, in].
        dense: no weight is pruned, so that an offset may be rounded.
    """
    shape = tuple(codes.shape)
    group = codes.shape[1] // grid.scale.shape[1]
    width = grid.bits + (grid.zero is not None)
    if group % BLOCK:
        return plain(grid.values(codes), f"groups of {group} inputs, where a block of the file has {BLOCK}")
    if not torch.equal(grid.scale.half().to(grid.scale.dtype), grid.scale):
        return plain(grid.values(codes), "scales that float16 does not hold")
    if width > 8:
        return plain(grid.values(codes), f"{grid.bits} bits and a zero point")
    if dense and grid.zero is not None and grid.bits == 4:
        offset = _offset(grid)
        rounding = ((offset.half().float() - offset) / grid.scale.float()).abs().max().item()
        return Layout(GGMLQuantizationType.Q4_1, shape, rounding=rounding), lambda: _q4_1(codes, grid)
    if width <= 4:
        return Layout(GGMLQuantizationType.Q4_0, shape), lambda: _q4_0(codes, grid)
    if width == 5:
        return Layout(GGMLQuantizationType.Q5_0, shape), lambda: _q5_0(codes, grid)
    return Layout(GGMLQuantizationType.Q8_0, shape), lambda: _q8_0(codes, grid)


def _q4_0(codes: Tensor, grid: Grid) -> NDArray[np.uint8]:
    return _joined(codes, _scales(codes, grid.scale), _halves(_whole(codes, grid) + 8))


def _q4_1(codes: Tensor, grid: Grid) -> NDArray[np.uint8]:
    low, _ = ends(grid.bits)
    return _joined(codes, _scales(codes, grid.scale), _scales(codes, _offset(grid)), _halves(_blocks(codes) - low))


def _q5_0(codes: Tensor, grid: Grid) -> NDArray[np.uint8]:
    """The fifth bits of a block's codes lie together, as one little-endian number of 32 bits."""
    whole = _whole(codes, grid) + 16
    fifth = (whole >> 4).reshape(-1, 4, 8) << torch.arange(8)
    return _joined(codes, _scales(codes, grid.scale), fifth.sum(-1), _halves(whole & 15))


def _q8_0(codes: Tensor, grid: Grid) -> NDArray[np.uint8]:
    return _joined(codes, _scales(codes, grid.scale), _whole(codes, grid) & 255)


def _whole(codes: Tensor, grid: Grid) -> Tensor:
    """q - z in blocks, int16 [blocks, 32]."""
    zero = 0 if grid.zero is None else _repeated(codes, grid.zero)
    return _blocks(codes) - zero


def _offset(grid: Grid) -> Tensor:
    """m = s (low - z): what the lowest code stands for, float32 like the scale."""
    assert grid.zero is not None
    return grid.scale.float() * (ends(grid.bits)[0] - grid.zero.float())


def _blocks(codes: Tensor) -> Tensor:
    return codes.to(torch.int16).reshape(-1, BLOCK)


def _repeated(codes: Tensor, of_groups: Tensor) -> Tensor:
    """What each group has [out, groups], for each block [blocks, 1]."""
    rows, width = codes.shape
    spread = of_groups.expand(rows, -1).repeat_interleave(width // BLOCK // of_groups.shape[1], dim=1)
    return spread.reshape(-1, 1)


def _scales(codes: Tensor, of_groups: Tensor) -> Tensor:
    """float16 for each block, as bytes [blocks, 2]."""
    return _bytes(_repeated(codes, of_groups.half()))


def _halves(codes: Tensor) -> Tensor:
    """Codes 0..15 [blocks, 32] as 16 bytes: the first half of a block in the low bits, the second in the high ones."""
    low, high = codes.chunk(2, dim=1)
    return low | (high << 4)


def _joined(codes: Tensor, *parts: Tensor) -> NDArray[np.uint8]:
    """The parts of each block side by side, uint8 [out, bytes a row]."""
    joined = torch.cat([part.to(torch.uint8) for part in parts], dim=1)
    array: NDArray[np.uint8] = joined.reshape(len(codes), -1).numpy()
    return array


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)
