"""Unlearns on the weights that ship: sparse, and on their grid if they are quantised."""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compression.core import masks
from compression.core.checkpoint import Checkpoint, CheckpointWriter
from compression.core.journal import Journal
from compression.quantization.grid import Grid
from compression.quantization.packed import Layout, pack, plain_weights, unpack
from compression.quantization.scheme import anatomy, from_manifest, layouts
from compression.training.loop import Recipe, train
from compression.training.masked_linear import MaskedLinear, attach
from compression.training.text import Shuffled
from compression.training.whole import load_whole, read_whole, write_whole


def unlearn_model(
    source: Checkpoint,
    writer: CheckpointWriter,
    journal: Journal,
    method: ModuleType,
    options: Mapping[str, Any],
    recipe: Recipe,
    forget: Tensor,
    retain: Tensor,
    sequences: int,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Trains masked low-rank updates, straight through the rounding to the grid, and writes the new codes.

    Scales are taken over to the byte and masks are proven, so mask and grid are those of `source`.

    Args:
        method: a module of compression.unlearning.METHODS.
        options: rank, alpha, seed, forget_ceiling, and the objective's own weights.
        forget, retain: int64 [N, T], the same T.
        sequences: of each, a step.

    Returns:
        forget_losses, retain_losses by step in nats a token; stopped; changed_codes, the share of the
        quantised weights that have left their code (for a checkpoint without a grid: of weights that moved).
    """
    stored, keep = read_whole(source, "load")
    schemes = from_manifest(source.manifest)
    bits = {layer: scheme.bits for layer, scheme in schemes.items()}
    grids = {layer: unpack(layer, stored, bits[layer])[1] for layer in source.layers if layer in bits}
    plain = plain_weights(stored, bits)
    working = {name: t.to(dtype) if t.is_floating_point() else t for name, t in plain.items()}
    model = load_whole(source.folder, working, device)
    every = {layer: keep.get(layer, torch.ones(*shape, dtype=torch.bool)) for layer, shape in source.layers.items()}
    on_device = {layer: grid.to(device) for layer, grid in grids.items()}
    layers = attach(model, every, options["rank"], options["alpha"], options["seed"], on_device)
    parameters = {f"{name}.{part}": getattr(layer, part) for name, layer in layers.items() for part in "AB"}

    draw_forget, draw_retain = (
        Shuffled(forget, sequences, options["seed"]),
        Shuffled(retain, sequences, options["seed"]),
    )

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        each = _sequence_losses(model, torch.cat([draw_forget(step), draw_retain(step)]))
        forgotten, retained = each[:sequences].mean(), each[sequences:].mean()
        figures = {"forget": forgotten.item(), "retain": retained.item()}
        return method.combine(forgotten, retained, options), figures

    def stop(figures: dict[str, float]) -> str | None:
        ceiling = options["forget_ceiling"]
        return f"forget loss reached {ceiling:g}" if figures["forget"] >= ceiling else None

    curves, stopped = train(parameters, loss, recipe, journal, "unlearn", 2 * sequences * forget.shape[1], stop)
    stays = layouts(schemes, anatomy(source.folder)) if schemes else {}
    moved = _write(source, writer, stored, keep, layers, grids, stays)
    return {
        "forget_losses": curves["forget"],
        "retain_losses": curves["retain"],
        "stopped": stopped,
        "changed_codes": moved,
    }


def _sequence_losses(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean loss of each sequence of ids [N, T] in nats a token, float32 [N]."""
    ids = ids.to(next(model.parameters()).device)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)


def _write(
    source: Checkpoint,
    writer: CheckpointWriter,
    stored: dict[str, Tensor],
    keep: dict[str, Tensor],
    layers: dict[str, MaskedLinear],
    grids: dict[str, Grid],
    stays: dict[str, Layout],
) -> float:
    """Writes the updated weights, each in the layout that it had; returns the share of weights that changed."""
    changed = total = 0
    for name, layer in layers.items():
        total += layer.weight.numel()
        if name in grids:
            before, grid = unpack(name, stored, grids[name].bits)
            merged = layer.merged().cpu()
            # A value is one code, but in bfloat16 the widest grids' neighbours may share one: what stays keeps its own.
            codes = torch.where(merged == grid.values(before), before, grid.codes(merged))
            if name in keep:
                masks.prove(name, grid.values(codes), keep[name])
            changed += int((codes != before).sum())
            stored |= pack(name, codes, grid, stays[name])
        else:
            before = stored[f"{name}.weight"]
            stored[f"{name}.weight"] = layer.merged(before).cpu()
            changed += int((stored[f"{name}.weight"] != before).sum())
    write_whole(source, writer, stored, keep, {})
    return changed / total
