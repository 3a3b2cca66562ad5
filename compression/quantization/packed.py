"""Codes and grids as files that others load: compressed-tensors' `pack-quantized` format.

In place of L.weight [out, in] of a layer L on a grid of b bits the shard holds

    L.weight_packed       int32 [out, ceil(in b / 32)], the codes of a row side by side, b bits each
    L.weight_scale        [out, groups], or [1] for the whole matrix
    L.weight_zero_point   if it is asymmetric: int32 [ceil(out b / 32), groups], codes packed down the columns;
                          int8 [1] for the whole matrix
    L.weight_shape        int64 [2]

`compression.quantization.scheme` says which layers depart from that, and why:

    loose   zero points are int8 [out, groups], and L.weight_global_scale is 1
    bytes   L.weight holds the codes, int8 [out, in], and there is no L.weight_packed
"""

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from torch import Tensor

from compression.core.adapter import read_adapter
from compression.core.checkpoint import Checkpoint
from compression.quantization.grid import Grid

Layout = Literal["packed", "loose", "bytes"]

PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_global_scale")


def pack(layer: str, codes: Tensor, grid: Grid, layout: Layout = "packed") -> dict[str, Tensor]:
    """The tensors that stand for a layer's weight: codes int8 [out, in] on their grid, of 2 to 8 bits."""
    whole = grid.scale.numel() == 1 < len(codes)
    parts = {"weight_scale": grid.scale.view(1) if whole else grid.scale}
    if grid.zero is not None:
        as_it_is = grid.zero.view(1) if whole else grid.zero
        packs = layout == "packed" and not whole
        parts["weight_zero_point"] = pack_to_int32(grid.zero, grid.bits, packed_dim=0) if packs else as_it_is
    if layout == "loose":
        parts["weight_global_scale"] = torch.ones(1)
    if layout == "bytes":
        parts["weight"] = codes
    else:
        parts |= {"weight_packed": pack_to_int32(codes, grid.bits), "weight_shape": torch.tensor(codes.shape)}
    return {f"{layer}.{part}": tensor for part, tensor in parts.items()}


def unpack(layer: str, tensors: Mapping[str, Tensor], bits: int) -> tuple[Tensor, Grid]:
    """The inverse of `pack`, in whatever layout: codes int8 [out, in] and their grid."""
    if (packed := tensors.get(f"{layer}.weight_packed")) is None:
        codes = tensors[f"{layer}.weight"]
    else:
        codes = unpack_from_int32(packed, bits, torch.Size(tensors[f"{layer}.weight_shape"].tolist()))
    scale, zero = tensors[f"{layer}.weight_scale"], tensors.get(f"{layer}.weight_zero_point")
    scale = scale.view(-1, scale.shape[-1])
    if zero is not None and zero.dtype == torch.int32:
        zero = unpack_from_int32(zero, bits, scale.shape, packed_dim=0).contiguous()
    return codes, Grid(bits, scale, None if zero is None else zero.view(scale.shape))


def rounded_layers(tensors: Mapping[str, Tensor]) -> list[str]:
    """The layers among a shard's tensors that stand there as codes, in whatever layout."""
    layers = [name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")]
    return [layer for layer in layers if f"{layer}.weight_packed" in tensors or f"{layer}.weight" in tensors]


def plain_weights(tensors: Mapping[str, Tensor], bits: Mapping[str, int]) -> dict[str, Tensor]:
    """A shard's tensors with every layer that stands there as codes as the plain weight that it stands for."""
    plain = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[2] not in PARTS}
    for layer in rounded_layers(tensors):
        codes, grid = unpack(layer, tensors, bits[layer])
        plain[f"{layer}.weight"] = grid.values(codes)
    return plain


def plain_outer(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The tensors outside the blocks as plain weights, whether they are quantised or not."""
    return plain_weights(checkpoint.outer(), _bits(checkpoint))


def base_reader(checkpoint: Checkpoint) -> Callable[[int], dict[str, Tensor]]:
    """Reads blocks of a checkpoint as plain weights, whether it is quantised or not; without its adapter."""
    return lambda index: plain_weights(checkpoint.block(index), _bits(checkpoint))


def block_reader(checkpoint: Checkpoint) -> Callable[[int], dict[str, Tensor]]:
    """Reads blocks as the weights that the model computes with: those of `base_reader`, and the adapter's share added.

    Sums are float32. Computed in bfloat16 they are rounded once more, where the adapter beside the weights is not.
    """
    read, adapter = base_reader(checkpoint), read_adapter(checkpoint)
    return read if adapter is None else lambda index: adapter.added(read(index))


def _bits(checkpoint: Checkpoint) -> dict[str, int]:
    bits: dict[str, int] = checkpoint.manifest.get("quantization", {}).get("bits", {})
    return bits
