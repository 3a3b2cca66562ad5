"""Quantises a model on disk block by block, each layer as soon as its input is known."""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from compression.core import masks
from compression.core.checkpoint import Checkpoint, CheckpointWriter
from compression.core.errors import Problem
from compression.core.journal import Journal
from compression.core.ledger import Ledger
from compression.quantization.bits import check_group_size
from compression.quantization.grid import Grid, fit_grid
from compression.quantization.method import Quantized, Settings
from compression.quantization.packed import pack
from compression.quantization.scheme import Anatomy, Scheme, layouts, pack_outer
from compression.rewriting import Rewritten, rewrite

ROWS = 8192  # of an embedding at a time


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
    scales, stored = source.scales(), layouts(schemes, model)
    check_group_size({layer: source.layers[layer] for layer in schemes if layer in source.layers}, settings.group_size)

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

    def outer(plain: dict[str, Tensor]) -> dict[str, Tensor]:
        ends = [layer for layer in schemes if layer not in source.layers]
        rounded = {layer: _round_end(layer, plain[f"{layer}.weight"], schemes[layer]) for layer in ends}
        return pack_outer(plain, rounded, stored, model)

    return rewrite("quantize", source, writer, journal, method.STATISTIC, quantize, ids, device, dtype, outer)


def _round_end(layer: str, weight: Tensor, scheme: Scheme) -> tuple[Tensor, Grid]:
    """Codes and grid of an embedding or a head, whose inputs are not looked at; some rows at a time, being many."""
    check_group_size({layer: list(weight.shape)}, scheme.group_size)
    if not weight.isfinite().all():
        raise Problem(f"{layer}.weight", "holds NaN or infinite values", "is the model file whole?")
    alike, rows = torch.ones(weight.shape[1]), len(weight) if scheme.group_size == "tensor" else ROWS
    parts = weight.split(rows)
    grids = [fit_grid(part, scheme.bits, scheme.group_size, scheme.symmetric, alike) for part in parts]
    codes = torch.cat([grid.codes(part) for grid, part in zip(grids, parts, strict=True)])
    zeros = [grid.zero for grid in grids if grid.zero is not None]
    return codes, Grid(scheme.bits, torch.cat([grid.scale for grid in grids]), torch.cat(zeros) if zeros else None)
