"""Calibration tokens on their way through the model, whose layers are changed once all of their input is known."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from compression.core import batches
from compression.core.errors import Problem
from compression.core.skeleton import Skeleton, linears
from compression.lockstep import walk_in_step


class Walk:
    """See the module's docstring.

    Args:
        skeleton: of the model as it is before the change.
        ids: int64 [N, T].
        hidden: states that enter the next block, if some have been changed before; None: those of block 0.

    Attributes:
        hidden: [N, T, d], the states that enter the next block.
    """

    def __init__(self, skeleton: Skeleton, ids: Tensor, hidden: Tensor | None) -> None:
        self.skeleton = skeleton
        self.batches = batches.split(ids, skeleton.device)
        begun = [skeleton.begin(batch) for batch in self.batches]
        self.hidden = torch.cat(begun) if hidden is None else hidden.to(skeleton.device)

    def through(self, index: int, statistic: type, change: Callable[[str, Any], Tensor], passes: int = 1) -> None:
        """Walks through block `index`.

        Args:
            statistic: class that sums up a layer's inputs; layers with the same input share one.
            change: (layer, its statistic) -> its new weight [out, in], with which all go on.
            passes: 1: each layer is changed as soon as its input is known, which is what the changed layers before it
                give. 2: inputs are those of the block as it was; when all are known all layers are changed, and the
                tokens walk again.

        Raises:
            Problem: a layer's inputs are not finite.
        """
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

        def renew(layer: str) -> None:
            summed = seen[leader[layer]]
            if not summed.norms().isfinite().all():
                raise Problem(layer, "its inputs hold NaN or infinite values", "are the weights before it sound?")
            module = layers[layer]
            module.weight.copy_(change(layer, summed))

        def look(batch: int) -> None:
            self.skeleton.run(index, states[batch], self.batches[batch])

        def run(batch: int) -> None:
            states[batch].copy_(self.skeleton.run(index, states[batch], self.batches[batch]))

        if passes == 1:
            walk_in_step(len(self.batches), run, layers, see, renew)
        else:
            walk_in_step(len(self.batches), look, layers, see, lambda _: None)
            for layer in leader:
                renew(layer)
            for batch in range(len(self.batches)):
                run(batch)
        seen.clear()  # what the functions above hold may wait for the collector of cycles
        latest.clear()
        self.skeleton.release(index)
