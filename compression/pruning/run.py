"""Prunes a model on disk block by block, each layer as soon as its input is known."""

from collections.abc import Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from compression.core import batches
from compression.core.checkpoint import Checkpoint, CheckpointWriter
from compression.core.errors import Problem
from compression.core.journal import Journal
from compression.core.memory import tidy
from compression.core.progress import progress
from compression.core.skeleton import Skeleton, linears
from compression.lockstep import walk_in_step
from compression.pruning.method import Pruned, Settings
from compression.pruning.pattern import Pattern, check_width

Ledger = dict[str, dict[str, float]]
NOTE = "note/"


@torch.no_grad()
def prune_model(
    source: Checkpoint,
    writer: CheckpointWriter,
    journal: Journal,
    method: ModuleType,
    patterns: Mapping[str, Pattern],
    settings: Settings,
    ids: Tensor,
    device: torch.device,
    dtype: torch.dtype,
) -> Ledger:
    """Writes the pruned blocks of `source` to `writer`, going on behind the journal's last block.

    Args:
        method: a module of compression.pruning.METHODS.
        patterns: what the mask of each linear in the blocks has to satisfy, by layer.
        settings: see there; a mask that `source` already has is filled in as `before`.
        ids: calibration tokens int64 [N, T]; not looked at by a method without STATISTIC.
        dtype: type of the forward pass; weights are pruned and written in the type in which they are stored.

    Returns:
        what the method noted, by layer and name, in the order of the model.

    Raises:
        Problem: a width that the pattern cannot divide, or weights or inputs that are not finite, by layer.
    """
    for layer, (_, width) in source.layers.items():
        check_width(patterns[layer], layer, width)
    finished, state = journal.load()
    ledger = _unpack(state)
    before = source.masks()
    outer = source.outer()
    writer.write_outer(outer)

    walk = None
    if method.STATISTIC is not None:
        walk = _Walk(Skeleton(source.folder, outer, source.block, device, dtype), ids, state.get("hidden"))
    blocks = range(finished, source.depth)
    for index in progress(blocks, what="prune", unit="block", total=source.depth, done=finished):
        tensors = source.block(index)
        masks = source.block_masks(index, before)
        keep: dict[str, Tensor] = {}
        scales: dict[str, Tensor] = {}

        def prune(
            layer: str,
            statistic: Any,
            tensors: Any = tensors,
            masks: Any = masks,
            keep: Any = keep,
            scales: Any = scales,
        ) -> Tensor:
            weight = tensors[f"{layer}.weight"].to(device)
            # A sum tells in a tenth of the time; only if it is not finite is each weight looked at.
            if not (weight.float().sum().isfinite() or weight.isfinite().all()):
                raise Problem(f"{layer}.weight", "holds NaN or infinite values", "is the model file whole?")
            done: Pruned = method.prune(weight, statistic, patterns[layer], replace(settings, before=masks.get(layer)))
            tensors[f"{layer}.weight"], keep[layer] = done.weight.cpu(), done.keep.cpu()
            ledger[layer] = done.notes
            if done.grid:
                scales[layer] = done.grid.scale.cpu()
            return done.weight

        if walk is None:
            for layer in source.layers:
                if f"{layer}.weight" in tensors:
                    prune(layer, None)
        else:
            walk.through(index, method.STATISTIC, prune)
        missed = [layer for layer in source.layers if f"{layer}.weight" in tensors and layer not in keep]
        if missed:
            raise Problem(missed[0], "no calibration token came by, so it cannot be pruned by its input")
        writer.write_block(index, tensors, keep, scales)
        journal.save(index + 1, _pack(ledger) | ({} if walk is None else {"hidden": walk.hidden}))
        tidy(sum(tensor.nbytes for tensor in tensors.values()))
    return {layer: dict(sorted(ledger.get(layer, {}).items())) for layer in source.layers}


def _pack(ledger: Ledger) -> dict[str, Tensor]:
    """A ledger as a journal holds it: a number a tensor."""
    return {
        f"{NOTE}{layer}/{name}": torch.tensor(value, dtype=torch.float64)
        for layer, notes in ledger.items()
        for name, value in notes.items()
    }


def _unpack(state: dict[str, Tensor]) -> Ledger:
    ledger: Ledger = {}
    for key, value in state.items():
        if key.startswith(NOTE):
            layer, name = key.removeprefix(NOTE).split("/")
            ledger.setdefault(layer, {})[name] = value.item()
    return ledger


class _Walk:
    """The calibration tokens on their way through the model.

    Attributes:
        hidden: [N, T, d], the states that enter the next block.
    """

    def __init__(self, skeleton: Skeleton, ids: Tensor, hidden: Tensor | None) -> None:
        self.skeleton = skeleton
        self.batches = batches.split(ids, skeleton.device)
        begun = [skeleton.begin(batch) for batch in self.batches]
        self.hidden = torch.cat(begun) if hidden is None else hidden.to(skeleton.device)

    def through(self, index: int, statistic: type, prune: Any) -> None:
        """Walks through block `index`; `prune(layer, statistic)` gives the layer's new weight."""
        block = self.skeleton.load(index)
        layers = linears(block, f"{self.skeleton.path}.{index}")
        states = self.hidden.split(len(self.batches[0]))
        seen: dict[str, Any] = {}
        leader: dict[str, str] = {}  # layer -> the layer whose input tensor it shares (k and v with q, up with gate)
        latest: dict[int, tuple[str, Tensor]] = {}

        def see(batch: int, layer: str, inputs: Tensor) -> None:
            before = latest.get(batch)
            if batch == 0:
                leader[layer] = leader[before[0]] if before and before[1] is inputs else layer
            latest[batch] = (layer, inputs)
            if leader[layer] == layer:
                if layer not in seen:
                    seen[layer] = statistic(inputs.shape[-1], inputs.device)
                seen[layer].update(inputs)

        def change(layer: str) -> None:
            summed = seen[leader[layer]]
            if not summed.norms().isfinite().all():
                raise Problem(layer, "its inputs hold NaN or infinite values", "are the weights before it sound?")
            module = layers[layer]
            module.weight.copy_(prune(layer, summed))

        def run(batch: int) -> None:
            states[batch].copy_(self.skeleton.run(index, states[batch], self.batches[batch]))

        walk_in_step(len(self.batches), run, layers, see, change)
        seen.clear()  # what the functions above hold may wait for the collector of cycles
        latest.clear()
        self.skeleton.release(index)
