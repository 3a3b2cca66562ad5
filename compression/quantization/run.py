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
from compression.quantization.bits import check_group_size, check_packable
from compression.quantization.ends import check_ends, round_end, what_ends_read
from compression.quantization.grid import Grid
from compression.quantization.method import Quantized, Settings
from compression.quantization.packed import pack
from compression.quantization.scheme import Anatomy, Scheme, layouts, pack_outer
from compression.rewriting import Rewritten, rewrite
from compression.statistics import Gram
from compression.walk import Walk


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
        schemes: by layer; in the blocks of one group size and symmetry, those of `settings`. A layer that is not
            named stays as it is. The embedding or a head may be among them; see compression.quantization.ends.
        model: the names of its modules.
        settings: see there.
        ids: calibration tokens int64 [N, T]; not looked at by a method without STATISTIC.
        dtype: type of the forward pass.

    Returns:
        what the method noted, by layer and name, in the order of the model.

    Raises:
        Problem: a layer has no packed layout that transformers loads, the group size does not divide a width, weights
            or inputs are not finite, or a pruned weight moved.
    """
    check_packable(schemes, source.transposed)
    scales, stored = source.scales(), layouts(schemes, model)
    check_group_size({layer: source.layers[layer] for layer in schemes if layer in source.layers}, settings.group_size)
    ends = {layer: scheme for layer, scheme in schemes.items() if layer not in source.layers}
    read: dict[str, Gram] = {}
    if ends:
        check_ends(source.outer(), ends)

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

    def behind(walk: Walk) -> None:
        read.update(what_ends_read(walk, ends, model))

    def outer(plain: dict[str, Tensor]) -> dict[str, Tensor]:
        rounded: dict[str, tuple[Tensor, Grid]] = {}
        for layer, scheme in ends.items():
            weight = plain[f"{layer}.weight"].to(device)
            codes, grid = round_end(weight, scheme, method, settings, read.get(layer))
            rounded[layer] = codes.cpu(), grid.to("cpu")
        return pack_outer(plain, rounded, stored, model)

    return rewrite("quantize", source, writer, journal, method.STATISTIC, quantize, ids, device, dtype, outer, behind)
