"""Codes and grids as files that others load: compressed-tensors' `pack-quantized` format.

For a layer `L` the shard holds L.weight_packed (int32, codes side by side), L.weight_scale [out, groups] and
L.weight_shape in place of L.weight.
"""

from collections.abc import Callable
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from torch import Tensor

from compression.core.adapter import read_adapter
from compression.core.checkpoint import Checkpoint
from compression.quantization.grid import Grid


def pack(layer: str, codes: Tensor, grid: Grid) -> dict[str, Tensor]:
    """The tensors that stand for a layer's weight: codes int8 [out, in] on their grid."""
    return {
        f"{layer}.weight_packed": pack_to_int32(codes, grid.bits),
        f"{layer}.weight_scale": grid.scale,
        f"{layer}.weight_shape": torch.tensor(codes.shape),
    }


def unpack(layer: str, tensors: dict[str, Tensor], bits: int) -> tuple[Tensor, Grid]:
    """The inverse of `pack`: codes int8 [out, in] and their grid."""
    shape = torch.Size(tensors[f"{layer}.weight_shape"].tolist())
    codes = unpack_from_int32(tensors[f"{layer}.weight_packed"], bits, shape)
    return codes, Grid(bits, tensors[f"{layer}.weight_scale"])


def plain_weights(tensors: dict[str, Tensor], bits: dict[str, int]) -> dict[str, Tensor]:
    """A block's tensors with every packed layer as the plain weight that it stands for."""
    packed = {name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")}
    plain = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[0] not in packed}
    for layer in packed:
        codes, grid = unpack(layer, tensors, bits[layer])
        plain[f"{layer}.weight"] = grid.values(codes)
        if f"{layer}.bias" in tensors:
            plain[f"{layer}.bias"] = tensors[f"{layer}.bias"]
    return plain


def base_reader(checkpoint: Checkpoint) -> Callable[[int], dict[str, Tensor]]:
    """Reads blocks of a checkpoint as plain weights, whether it is quantised or not; without its adapter."""
    bits = checkpoint.manifest.get("quantization", {}).get("bits", {})
    return lambda index: plain_weights(checkpoint.block(index), bits)


def block_reader(checkpoint: Checkpoint) -> Callable[[int], dict[str, Tensor]]:
    """Reads blocks as the weights that the model computes with: those of `base_reader`, and the adapter's share added.

    Sums are float32. Computed in bfloat16 they are rounded once more, where the adapter beside the weights is not.
    """
    read, adapter = base_reader(checkpoint), read_adapter(checkpoint)
    return read if adapter is None else lambda index: adapter.added(read(index))


def config_entry(bits: dict[str, int], group_size: int) -> dict[str, Any]:
    """`quantization_config` of config.json, which tells transformers and vLLM how to read the shards.

    Args:
        bits: by layer; layers that are not named stay in full precision.
        group_size: inputs that share a scale.
    """
    groups = {
        f"group_{number}": QuantizationScheme(
            targets=[layer for layer, own in bits.items() if own == width],
            weights=QuantizationArgs(
                num_bits=width, type="int", symmetric=True, strategy="group", group_size=group_size
            ),
        )
        for number, width in enumerate(sorted(set(bits.values())))
    }
    config = QuantizationConfig(
        config_groups=groups, format="pack-quantized", quantization_status="compressed", ignore=["lm_head"]
    )
    entry: dict[str, Any] = config.model_dump(mode="json")
    return entry | {"quant_method": "compressed-tensors"}
