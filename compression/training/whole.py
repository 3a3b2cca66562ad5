"""The whole model in memory, which training needs."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils import checkpoint as recomputation

from compression.core.checkpoint import Checkpoint, CheckpointWriter
from compression.core.errors import Problem
from compression.core.progress import progress
from compression.core.skeleton import empty_model, find_blocks


def load_whole(folder: Path, tensors: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The model that config.json describes with `tensors` as its weights, by full name, in `dtype`; none trains yet.

    Raises:
        Problem: the model does not predict the next token, which is what training is about.
    """
    model = empty_model(folder)
    check_causal(model)
    placed = {name: t.to(device, dtype if t.is_floating_point() else t.dtype) for name, t in tensors.items()}
    model.load_state_dict(placed, strict=False, assign=True)
    model.tie_weights()  # type: ignore[operator]
    return model.to(device).requires_grad_(False)


def check_causal(model: nn.Module) -> None:
    """Refuses what has no next token to be trained on.

    Raises:
        Problem: see there.
    """
    if not model.can_generate():  # type: ignore[operator]
        raise Problem(type(model).__name__, "an encoder cannot be trained on next-token loss", "valid: no training")


def recompute_blocks(model: nn.Module) -> None:
    """Keeps only what enters each block for the backward pass, and computes the block anew there."""
    blocks: nn.ModuleList = model.get_submodule(find_blocks(model))  # type: ignore[assignment]
    for block in blocks:
        block.forward = partial(recomputation.checkpoint, block.forward, use_reentrant=False)


def read_whole(checkpoint: Checkpoint, what: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All tensors of a checkpoint as stored, and its masks bool [out, in] by layer."""
    tensors, packed = checkpoint.outer(), checkpoint.masks()
    keep: dict[str, Tensor] = {}
    for index in progress(range(checkpoint.depth), what=what, unit="block"):
        tensors |= checkpoint.block(index)
        keep |= checkpoint.block_masks(index, packed)
    return tensors, keep


def write_whole(
    source: Checkpoint,
    writer: CheckpointWriter,
    tensors: dict[str, Tensor],
    keep: dict[str, Tensor],
    scales: dict[str, Tensor],
) -> None:
    """Writes all tensors of a model, its masks, and scales of the grid if it lies on one, block by block."""
    prefixes = {index: f"{source.blocks}.{index}." for index in range(source.depth)}
    writer.write_outer({name: t for name, t in tensors.items() if not name.startswith(f"{source.blocks}.")})
    for index, prefix in prefixes.items():
        own = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        own_masks, own_scales = (
            {layer: tensor for layer, tensor in every.items() if layer.startswith(prefix)} for every in (keep, scales)
        )
        writer.write_block(index, own, own_masks, own_scales)
