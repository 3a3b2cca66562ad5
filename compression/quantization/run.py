"""Quantises a model on disk block by block."""

from types import ModuleType

import torch
from torch import Tensor

from compression.core import masks
from compression.core.checkpoint import Checkpoint, CheckpointWriter
from compression.core.errors import Problem
from compression.core.journal import Journal
from compression.core.progress import progress
from compression.quantization.bits import check_group_size
from compression.quantization.grid import Grid
from compression.quantization.packed import pack


@torch.no_grad()
def quantize_model(
    source: Checkpoint,
    writer: CheckpointWriter,
    journal: Journal,
    method: ModuleType,
    bits: dict[str, int],
    group_size: int,
) -> None:
    """Writes the packed blocks of `source` to `writer`, going on behind the journal's last block.

    Args:
        method: a module of compression.quantization.METHODS.
        bits: by layer.

    Raises:
        Problem: the group size does not divide a width, weights are not finite, or a pruned weight moved.
    """
    check_group_size(source.layers, group_size)
    packed_masks, scales = source.masks(), source.scales()
    finished, _ = journal.load()
    writer.write_outer(source.outer())
    blocks = range(finished, source.depth)
    for index in progress(blocks, what="quantize", unit="block", total=source.depth, done=finished):
        tensors = source.block(index)
        keep = source.block_masks(index, packed_masks)
        for layer in [name for name in bits if f"{name}.weight" in tensors]:
            weight: Tensor = tensors.pop(f"{layer}.weight")
            if not weight.isfinite().all():
                raise Problem(f"{layer}.weight", "holds NaN or infinite values")
            given = Grid(bits[layer], scales[layer]) if layer in scales else None
            codes, grid = method.quantize(weight, bits[layer], group_size, given)
            if layer in keep:
                masks.prove(layer, codes, keep[layer])
            tensors |= pack(layer, codes, grid)
        writer.write_block(index, tensors, keep)
        journal.save(index + 1, {})
