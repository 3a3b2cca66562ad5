"""LLM Surgeon from checkpoint to checkpoint, shot by shot.

A shot measures the curvature of the model as it is, says what each structure would cost, draws one threshold, removes
what lies below it and lets the rest make up for that. Nothing is held but a block: inverses and scores of a block go to
disk as soon as its curvature is known, and are read again once the threshold is. Between shots weights are float32;
the last one rounds them to the type in which they came.

    work/shot-T/curvature     states and journal of the sweep
    work/shot-T/block-I       by layer, inverses P and Q, and scores
    work/shot-T/checkpoint    the model after it; finished shots are not taken again, their scratch is gone

Before each shot but the first a correction may be learned, see correction.py.
"""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from compression.core.checkpoint import MANIFEST, MASKS, OUTER, Checkpoint, CheckpointWriter, block_file
from compression.core.errors import Problem
from compression.core.files import read_tensors, write_tensors
from compression.core.ledger import Ledger, in_order
from compression.core.progress import progress
from compression.core.skeleton import Skeleton
from compression.pruning.pattern import Structured
from compression.surgeon.correction import CORRECTED, CORRECTION, check_correctable, correct
from compression.surgeon.coupled import Coupled, find_coupled, write_smaller
from compression.surgeon.curvature import factors_by_block
from compression.surgeon.elements import Elements
from compression.surgeon.factors import Factors, Inverses, alive, invert
from compression.surgeon.hidden import Narrowed
from compression.surgeon.lines import Lines
from compression.surgeon.shrink import Shrunk
from compression.surgeon.stream import Stream, find_stream, write_narrower
from compression.surgeon.way import Look, Task, Way

CHECKPOINT = "checkpoint"
CURVATURE = "curvature"
NONE = Inverses(torch.empty(0), torch.empty(0))


@dataclass(frozen=True)
class Operated:
    """What is to be told of a pruned checkpoint.

    Attributes:
        ledger: by layer, `dropped`, and `cost`: the loss increase that was predicted for what went, each for itself,
            summed over the shots in nats a token.
        corrections: losses of what was learned between shots, by correction and step, in nats a token.
        shrunk: what has become smaller, if anything has.
    """

    ledger: Ledger
    corrections: list[list[float]]
    shrunk: Shrunk | Narrowed | None


def prune_by_curvature(
    task: Task, writer: CheckpointWriter, work: Path, ids: Tensor, device: torch.device, dtype: torch.dtype
) -> Operated:
    """Writes `task.source`, pruned, going on behind the last finished shot and, within a shot, behind the last block.

    Args:
        work: a folder of this very computation.
        ids: calibration tokens int64 [N, T].
        dtype: of the forward and backward pass.

    Raises:
        Problem: weights that are not finite, curvature that cannot be inverted, a quota that cannot be reached, a
            disk that is too small for the inverses.
    """
    way, settings = _way(task), task.settings
    correction = settings.correction if settings.shots > 1 else None
    if correction:
        check_correctable(task.source)
    _check_room(work, task, way.layers(), ids)
    taken = max((shot for shot in range(1, settings.shots + 1) if _is_taken(work, shot)), default=0)
    latest = Checkpoint(_shot(work, taken) / CHECKPOINT) if taken else task.source
    for shot in range(taken + 1, settings.shots + 1):
        folder = _shot(work, shot)
        if correction and shot > 1:
            latest = correct(latest, folder, correction, shot, ids, device, dtype)
        _take(way, task, latest, folder, shot, ids, device, dtype)
        latest = Checkpoint(folder / CHECKPOINT)
        shutil.rmtree(_shot(work, shot - 1), ignore_errors=True)
    return Operated(latest.manifest["pruning"], latest.manifest["corrections"], _finish(way, latest, writer))


def _way(task: Task) -> Way:
    if not isinstance(task.pattern, Structured):
        return Elements(task)
    if task.pattern.coupled:
        return find_coupled(task)
    return find_stream(task) if "hidden" in task.pattern.kinds else Lines(task)


def _shot(work: Path, shot: int) -> Path:
    return work / f"shot-{shot}"


def _is_taken(work: Path, shot: int) -> bool:
    return (_shot(work, shot) / CHECKPOINT / MANIFEST).exists()


@torch.no_grad()
def _take(
    way: Way,
    task: Task,
    before: Checkpoint,
    folder: Path,
    shot: int,
    ids: Tensor,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Takes a shot: `before` -> folder/checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    layers, masks = way.layers(), before.masks()
    skeleton = Skeleton(before.folder, before.outer(), before.block, device, dtype)
    with torch.enable_grad():
        for index, factors in factors_by_block(skeleton, ids, layers, folder / CURVATURE, task.settings.curvature):
            keep = _masks(before, index, masks)
            write_tensors(_scratch(folder, index), _look_at(way, task, before.block(index), keep, factors, device))
    del skeleton

    decisions = way.decide(partial(_looks, before, layers, folder, device), shot / task.settings.shots)
    writer = CheckpointWriter(folder / CHECKPOINT, before.folder)
    ledger: Ledger = {layer: dict(notes) for layer, notes in before.manifest.get("pruning", {}).items() if shot > 1}
    for index in progress(range(before.depth), what=f"shot {shot} of {task.settings.shots}", unit="block"):
        keep, last = _masks(before, index, masks), shot == task.settings.shots
        if not (decisions.keys() & keep.keys() or task.settings.correction or last):
            writer.link_block(before, index, keep)
            continue
        tensors = before.block(index)
        tensors |= {f"{layer}.weight": tensors[f"{layer}.weight"].float() for layer in keep}
        scratch = _read_scratch(folder, index, device)
        for layer in [layer for layer in keep if layer in decisions]:
            seen, inverses = scratch.get(layer, ({}, NONE))
            weight, bias = _joined(tensors, layer, device)
            new, left, cost = way.remove(weight, keep[layer].to(device), decisions[layer], seen, inverses)
            tensors[f"{layer}.weight"], keep[layer] = new[:, : left.shape[1]].cpu(), left.cpu()
            if bias:
                tensors[f"{layer}.bias"] = new[:, -1].cpu()
            notes = ledger.setdefault(layer, {"cost": 0.0})
            notes["cost"] += cost
            notes["dropped"] = float((~left).sum())
        if last:
            types = {name: tensor.dtype for name, tensor in task.source.block(index).items()}
            tensors = {name: tensor.to(types[name]) for name, tensor in tensors.items()}
        writer.write_block(index, tensors, keep)
    outer = before.outer()
    writer.write_outer(way.outer(outer, decisions) if isinstance(way, Stream) else outer)
    record = {"blocks": before.blocks, "layers": before.layers, "pruning": in_order(ledger, list(before.layers))}
    writer.finish(before.depth, record | {"corrections": before.manifest["corrections"] if shot > 1 else []})
    for file in folder.glob("block-*"):
        file.unlink()
    for done in (CURVATURE, CORRECTION, CORRECTED):
        shutil.rmtree(folder / done, ignore_errors=True)


@torch.no_grad()
def _look_at(
    way: Way,
    task: Task,
    tensors: dict[str, Tensor],
    keep: dict[str, Tensor],
    factors: Mapping[str, Factors],
    device: torch.device,
) -> dict[str, Tensor]:
    """What is stored of a block: what its layers score and, if what stays is to move, inverses.

    Layers that share an input share the inverse of its factor, unless they have lost different columns.
    """
    stored: dict[str, Tensor] = {}
    inverted: dict[tuple[int, bytes], Tensor] = {}
    for layer, own in factors.items():
        weight, bias = _joined(tensors, layer, device)
        inverses = NONE
        if task.updating:
            rows, columns = alive(weight, own, bias)
            key = (id(own.inputs), columns.numpy(force=True).tobytes())
            if key not in inverted:
                inverted[key] = invert(own.inputs, weight.shape[1], columns, task.settings.damping_inputs)
            inverses = Inverses(inverted[key], invert(own.outputs, len(weight), rows, task.settings.damping_outputs))
            stored[f"{layer}/Q"], stored[f"{layer}/P"] = inverses.inputs.clone(), inverses.outputs
        seen = way.look(layer, weight, keep[layer].to(device), own, inverses)
        stored |= {f"{layer}/{name}": scores for name, scores in seen.items()}
    return stored


def _looks(source: Checkpoint, layers: list[str], folder: Path, device: torch.device) -> Iterator[Look]:
    """(layer, what it scores by name), in the order of the model."""
    for index in range(source.depth):
        scratch = _read_scratch(folder, index, device)
        yield from ((layer, scratch[layer][0]) for layer in layers if layer in scratch)


def _read_scratch(folder: Path, index: int, device: torch.device) -> dict[str, tuple[dict[str, Tensor], Inverses]]:
    """By layer of a block, what it scores, by name, and its inverses."""
    file, found = _scratch(folder, index), dict[str, dict[str, Tensor]]()
    for key, tensor in read_tensors(file).items() if file.exists() else ():
        layer, _, name = key.rpartition("/")
        found.setdefault(layer, {})[name] = tensor.to(device)
    return {
        layer: (seen, Inverses(seen.pop("Q", NONE.inputs), seen.pop("P", NONE.outputs)))
        for layer, seen in found.items()
    }


def _scratch(folder: Path, index: int) -> Path:
    return folder / f"block-{index:05d}.safetensors"


def _joined(tensors: Mapping[str, Tensor], layer: str, device: torch.device) -> tuple[Tensor, bool]:
    """W' float32 [R, c], the bias its last column, and whether there is one.

    Raises:
        Problem: it holds NaN or infinite values.
    """
    weight, bias = tensors[f"{layer}.weight"], tensors.get(f"{layer}.bias")
    parts = [weight] if bias is None else [weight, bias[:, None]]
    joined = torch.cat([part.to(device, torch.float32) for part in parts], 1)
    if not joined.isfinite().all():
        raise Problem(f"{layer}.weight", "holds NaN or infinite values", "is the model file whole?")
    return joined, bias is not None


def _masks(checkpoint: Checkpoint, index: int, packed: dict[str, Tensor]) -> dict[str, Tensor]:
    """Masks bool [R, C] of all linears of a block."""
    prefix = f"{checkpoint.blocks}.{index}."
    shapes = {layer: shape for layer, shape in checkpoint.layers.items() if layer.startswith(prefix)}
    whole = {layer: torch.ones(*shape, dtype=torch.bool) for layer, shape in shapes.items()}
    return whole | checkpoint.block_masks(index, packed)


def _check_room(work: Path, task: Task, layers: list[str], ids: Tensor) -> None:
    """Raises Problem when the disk will not hold what a shot puts there."""
    sizes = [task.source.layers[layer] for layer in layers]
    squares = sum(rows**2 + width**2 for rows, width in sizes) if task.updating else 0
    weights = sum(rows * width for rows, width in task.source.layers.values())
    states = task.source.depth * ids.numel() * min(min(sizes, default=[0]))
    copies = 3 if task.settings.correction is None else 4  # the model before and after, and scores or journals
    needed = 4 * (squares + copies * weights) + 2 * states
    work.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(work).free) < needed:
        raise Problem(
            str(work),
            f"{free / 1e9:.1f} GB are free, but inverses, scores and states of a shot may take {needed / 1e9:.1f}",
            "free some space; fewer prune.sequences, or surgeon.update none, take less",
        )


def _finish(way: Way, final: Checkpoint, writer: CheckpointWriter) -> Shrunk | Narrowed | None:
    """Hands over the files of the last checkpoint, without what can be cut out of them."""
    if isinstance(way, Coupled):
        return write_smaller(final, way, writer)
    if isinstance(way, Stream):
        return write_narrower(final, way, writer)
    for name in (OUTER, MASKS, *(block_file(index) for index in range(final.depth))):
        writer.link(final, name)
    return None
