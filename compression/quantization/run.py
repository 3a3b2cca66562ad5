"""Quantises a model on disk block by block, each layer as soon as its input is known."""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from compression.core import masks
from compression.core.checkpoint import Checkpoint, CheckpointWriter
from compression.core.journal import Journal
from compression.core.ledger import Ledger
from compression.quantization.bits import check_group_size
from compression.quantization.grid import Grid, fit_grid
from compression.quantization.method import Quantized, Settings
from compression.quantization.packed import pack
from compression.quantization.scheme import Anatomy, Scheme, layouts, pack_outer
from compression.rewriting import Rewritten, rewrite


def quantize_model(
    source: Checkpoint,
    writer: CheckpointWriter,
    journal: Journal,
    method: ModuleType,
    schemes: Mapping[str, Scheme],
    model: Anatomy,
    settings: Settings,
    ids: Tensor,
    device: torch.device,
    dtype: torch.dtype,
) -> Ledger:
    """Writes the packed blocks of `source` to `writer`, going on behind the journal's last block.

    Args:
        method: a module of compression.quantization.METHODS, for the layers in the blocks.
        schemes: by layer, of one group size and symmetry, those of `settings`; a layer that is not named stays as it
            is. The embedding, or a head of its own, is rounded to nearest, clipped where that errs less.
        model: the names of its modules.
        settings: see there.
        ids: calibration tokens int64 [N, T]; not looked at by a method without STATISTIC.
        dtype: type of the forward pass.

    Returns:
        what the method noted, by layer and name, in the order of the model.

    Raises:
        Problem: the group size does not divide a width, weights or inputs are not finite, or a pruned weight moved.
    """
    scales, outer, stored = source.scales(), source.outer(), layouts(schemes, model)
    ends = {layer: outer[f"{layer}.weight"] for layer in schemes if layer not in source.layers}
    widths = source.layers | {layer: list(weight.shape) for layer, weight in ends.items()}
    check_group_size({layer: widths[layer] for layer in schemes}, settings.group_size)
    rounded = {layer: _round_end(weight, schemes[layer]) for layer, weight in ends.items()}

    def quantize(layer: str, weight: Tensor, statistic: Any, keep: Tensor | None) -> Rewritten:
        if layer not in schemes:
            return Rewritten(weight, {"weight": weight}, keep)
        bits = schemes[layer].bits
        if keep is not None:
            masks.prove(layer, weight, keep)
            keep = keep.to(device)
        given = Grid(bits, scales[layer].to(device)) if layer in scales else None
        done: Quantized = method.quantize(weight, bits, settings, statistic, keep, given)
        values = done.grid.values(done.codes)
        if keep is not None:
            masks.prove(layer, values, keep)
        packed = pack(layer, done.codes.cpu(), done.grid.to("cpu"), stored[layer])
        tensors = {name.removeprefix(f"{layer}."): part for name, part in packed.items()}
        return Rewritten(values, tensors, keep, notes=done.notes)

    packed_outer = pack_outer(outer, rounded, stored, model)
    return rewrite("quantize", source, writer, journal, method.STATISTIC, quantize, ids, device, dtype, packed_outer)


def _round_end(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Grid]:
    """An embedding or a head, whose inputs are not looked at."""
    alike = torch.ones(weight.shape[1])
    grid = fit_grid(weight, scheme.bits, scheme.group_size, scheme.symmetric, alike)
    return grid.codes(weight), grid
