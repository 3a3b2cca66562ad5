"""Writes a model anew block by block, each linear once its input is known: what pruning and quantising share."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from compression.core import ledger as ledgers
from compression.core.checkpoint import Checkpoint, CheckpointWriter
from compression.core.errors import Problem
from compression.core.journal import Journal
from compression.core.ledger import Ledger
from compression.core.memory import tidy
from compression.core.progress import progress
from compression.core.skeleton import Skeleton
from compression.walk import Walk


@dataclass(frozen=True)
class Rewritten:
    """A layer after it has been changed.

    Attributes:
        weight: [out, in], with which the calibration tokens go on.
        tensors: what stands in the shard for it, by the last part of the name (`weight`).
        keep: its mask bool [out, in], if it has one.
        scale: of the grid on which `weight` lies though it is stored as it is, if it does.
        notes: figures for the ledger, by name.
    """

    weight: Tensor
    tensors: dict[str, Tensor]
    keep: Tensor | None = None
    scale: Tensor | None = None
    notes: dict[str, float] = field(default_factory=dict)


@torch.no_grad()
def rewrite(
    what: str,
    source: Checkpoint,
    writer: CheckpointWriter,
    journal: Journal,
    statistic: type | None,
    change: Callable[[str, Tensor, Any, Tensor | None], Rewritten],
    ids: Tensor,
    device: torch.device,
    dtype: torch.dtype,
    outer: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda plain: plain,
    behind: Callable[[Walk], None] = lambda _: None,
    passes: int = 1,
) -> Ledger:
    """Writes the changed blocks of `source` to `writer`, going on behind the journal's last block.

    Args:
        what: is done, for the bar.
        statistic: class that sums up a layer's inputs; None: inputs are not looked at, and no token is computed.
        change: (layer, weight [out, in] as it is stored, its statistic, its mask bool [out, in] so far) -> the layer.
        ids: calibration tokens int64 [N, T]; not looked at without a statistic.
        dtype: type of the forward pass.
        outer: what is written in place of the tensors outside the blocks.
        behind: is shown the tokens behind the last block, before `outer` is called; not without a statistic.
        passes: through each block, as in compression.walk.

    Returns:
        what was noted, by layer and name, in the order of the model.

    Raises:
        Problem: weights or inputs that are not finite, or a layer that no token reached, by layer.
    """
    finished, state = journal.load()
    ledger, before, plain = ledgers.unpack(state), source.masks(), source.outer()
    walk = None
    if statistic is not None:
        walk = Walk(Skeleton(source.folder, plain, source.block, device, dtype), ids, state.get("hidden"))
    blocks = range(finished, source.depth)
    for index in progress(blocks, what=what, unit="block", total=source.depth, done=finished):
        tensors, masks = source.block(index), source.block_masks(index, before)
        ready: dict[str, Tensor] = {}
        keep: dict[str, Tensor] = {}
        scales: dict[str, Tensor] = {}

        def renew(
            layer: str,
            seen: Any,
            tensors: Any = tensors,
            masks: Any = masks,
            ready: Any = ready,
            keep: Any = keep,
            scales: Any = scales,
        ) -> Tensor:
            weight = tensors.pop(f"{layer}.weight").to(device)
            # A sum tells in a tenth of the time; only if it is not finite is each weight looked at.
            if not (weight.float().sum().isfinite() or weight.isfinite().all()):
                raise Problem(f"{layer}.weight", "holds NaN or infinite values", "is the model file whole?")
            new = change(layer, weight, seen, masks.get(layer))
            ready.update({f"{layer}.{name}": tensor.cpu() for name, tensor in new.tensors.items()})
            if new.keep is not None:
                keep[layer] = new.keep.cpu()
            if new.scale is not None:
                scales[layer] = new.scale.cpu()
            ledger[layer] = new.notes
            return new.weight

        here = [layer for layer in source.layers if f"{layer}.weight" in tensors]
        if walk is None or statistic is None:
            for layer in here:
                renew(layer, None)
        else:
            walk.through(index, statistic, renew, passes)
        for layer in here:
            if f"{layer}.weight" in tensors:
                raise Problem(layer, "no calibration token came by, so nothing is known of its input")
        tensors |= ready
        writer.write_block(index, tensors, keep, scales)
        journal.save(index + 1, ledgers.pack(ledger) | ({} if walk is None else {"hidden": walk.hidden}))
        size = sum(tensor.nbytes for tensor in tensors.values())
        for held in (tensors, ready, keep, scales):
            held.clear()
        tidy(size)
    if walk is not None:
        behind(walk)
        walk = None  # its tokens make room
    writer.write_outer(outer(plain))
    return ledgers.in_order(ledger, list(source.layers))
