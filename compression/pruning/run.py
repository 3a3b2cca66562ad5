"""Prunes a model on disk block by block, each layer once its input is known."""

from collections.abc import Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from compression.core.checkpoint import Checkpoint, CheckpointWriter
from compression.core.journal import Journal
from compression.core.ledger import Ledger
from compression.pruning import magnitude
from compression.pruning.method import Pruned, Settings
from compression.pruning.pattern import Pattern, check_width
from compression.rewriting import Rewritten, rewrite


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
    passes: int = 1,
) -> Ledger:
    """Writes the pruned blocks of `source` to `writer`, going on behind the journal's last block.

    Args:
        method: a module of compression.pruning.METHODS.
        patterns: what the mask of each linear in the blocks has to satisfy, by layer.
        settings: see there; a mask that `source` already has is filled in as `before`.
        ids: calibration tokens int64 [N, T]; not looked at by a method without STATISTIC.
        dtype: type of the forward pass; weights are pruned and written in the type in which they are stored.
        passes: through each block: 1, or 2 as in the papers (compression.walk).

    Returns:
        what the method noted, by layer and name, in the order of the model. `unseen` marks an expert that no token was
        sent to: of its inputs nothing is known, and it is pruned by magnitude.

    Raises:
        Problem: a width that the pattern cannot divide, or weights or inputs that are not finite, by layer.
    """
    for layer, (_, width) in source.layers.items():
        check_width(patterns[layer], layer, width)

    def prune(layer: str, weight: Tensor, statistic: Any, before: Tensor | None) -> Rewritten:
        unseen = statistic is not None and not statistic.tokens
        own = magnitude if unseen else method
        done: Pruned = own.prune(weight, statistic, patterns[layer], replace(settings, before=before))
        notes = done.notes | ({"unseen": 1.0} if unseen else {})
        scale = done.grid.scale if done.grid else None
        return Rewritten(done.weight, {"weight": done.weight}, done.keep, scale, notes)

    return rewrite("prune", source, writer, journal, method.STATISTIC, prune, ids, device, dtype, passes=passes)
