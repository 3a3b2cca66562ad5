"""Prunes a model on disk block by block, each layer as soon as its input is known."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from compression.core import batches
from compression.core.checkpoint import Checkpoint, CheckpointWriter
from compression.core.errors import Problem
from compression.core.journal import Journal
from compression.core.progress import progress
from compression.core.skeleton import Skeleton, linears
from compression.lockstep import walk_in_step
from compression.pruning.pattern import Pattern, check_width


@torch.no_grad()
def prune_model(
    source: Checkpoint,
    writer: CheckpointWriter,
    journal: Journal,
    method: ModuleType,
    pattern: Pattern,
    ids: Tensor,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Writes the pruned blocks of `source` to `writer`, going on behind the journal's last block.

    Args:
        method: a module of compression.pruning.METHODS.
        ids: calibration tokens int64 [N, T]; not looked at by a method without STATISTIC.
        dtype: type of the forward pass; weights are pruned and written in the type in which they are stored.

    Raises:
        Problem: a width that the pattern cannot divide, or weights or inputs that are not finite, by layer.
    """
    for layer, (_, width) in source.layers.items():
        check_width(pattern, layer, width)
    finished, state = journal.load()
    outer = source.outer()
    writer.write_outer(outer)

    walk = None
    if method.STATISTIC is not None:
        walk = _Walk(Skeleton(source.folder, outer, source.block, device, dtype), ids, state.get("hidden"))
    blocks = range(finished, source.depth)
    for index in progress(blocks, what="prune", unit="block", total=source.depth, done=finished):
        tensors = source.block(index)
        keep: dict[str, Tensor] = {}

        def prune(layer: str, statistic: Any, tensors: dict[str, Tensor] = tensors, keep: Any = keep) -> Tensor:
            weight = tensors[f"{layer}.weight"].to(device)
            if not (weight.float().sum().isfinite() or weight.isfinite().all()):  # a sum tells in a tenth of the time
                raise Problem(f"{layer}.weight", "holds NaN or infinite values", "is the model file whole?")
            pruned, mask = method.prune(weight, statistic, pattern)
            tensors[f"{layer}.weight"], keep[layer] = pruned.cpu(), mask.cpu()
            return pruned

        if walk is None:
            for layer in source.layers:
                if f"{layer}.weight" in tensors:
                    prune(layer, None)
        else:
            walk.through(index, method.STATISTIC, prune)
        missed = [layer for layer in source.layers if f"{layer}.weight" in tensors and layer not in keep]
        if missed:
            raise Problem(missed[0], "no calibration token came by, so it cannot be pruned by its input")
        writer.write_block(index, tensors, keep)
        journal.save(index + 1, {} if walk is None else {"hidden": walk.hidden})


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
        self.skeleton.release(index)
