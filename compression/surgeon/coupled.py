"""Hidden units of MLPs and heads of attentions go, from every layer that holds a part of them: the model gets smaller.

What one costs is what its columns cost in the layer that reads it, and that layer makes up for them. The rows that
write it go for nothing. During the shots all tensors keep their shapes; `write_smaller` cuts in the end.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from compression.core.checkpoint import Checkpoint, CheckpointWriter
from compression.pruning.pattern import Structured
from compression.surgeon.allot import allot
from compression.surgeon.costs import column_group_costs
from compression.surgeon.factors import Factors, Inverses
from compression.surgeon.lines import Removed, remove_lines
from compression.surgeon.shrink import Shrunk, shrink
from compression.surgeon.structures import KINDS, Key, Structure, counts, find_structures, left_out
from compression.surgeon.way import Left, Looks, Scores, Task
from compression.surgeon.widths import read_config

GONE = -1.0  # the score of what an earlier shot has removed: it goes first, even before what costs nothing


@dataclass(frozen=True)
class Coupled:
    """See way.py.

    Attributes:
        structures: of the kinds that go, by block and kind; those that have a part in a dense layer are not among them.
    """

    task: Task
    structures: dict[Key, Structure]

    def layers(self) -> list[str]:
        return [structure.reader for structure in self.structures.values()]

    def look(self, layer: str, weight: Tensor, keep: Tensor, factors: Factors, inverses: Inverses) -> dict[str, Tensor]:
        """`structures` [n]: what each costs that this layer reads."""
        groups = next(own for own in self.structures.values() if own.reader == layer).columns.to(keep.device)
        costs = column_group_costs(weight, factors, inverses, groups, self.task.updating)
        return {"structures": costs.masked_fill(~keep[:, groups].any(0).any(1), GONE)}

    def decide(self, looks: Looks, share: float) -> dict[str, Removed]:
        seen = {layer: own["structures"].cpu() for layer, own in looks()}
        costs = {key: seen[structure.reader] for key, structure in self.structures.items()}
        config = read_config(self.task.source.folder)
        multiple = self.task.settings.multiple if share == 1 else 1
        widths = {}
        for (_, kind), own in self.structures.items():
            most = max(int((costs[key] != GONE).sum()) for key in costs if key[1] == kind)
            widths[kind] = [count for count in counts(config, own, multiple) if count <= most]
        kept = allot(
            costs,
            {key: structure.weights for key, structure in self.structures.items()},
            widths,
            self.task.due(share),
            not self.task.together,
            self.task.source.depth,
        )
        removed: dict[str, Removed] = {}
        for key, structure in self.structures.items():
            gone = left_out(structure, kept[key])
            for layer in structure.writers:
                rows, columns = self._lines(layer)
                rows = rows.index_fill(0, structure.rows[layer][gone].flatten(), True)
                removed[layer] = Removed(rows, columns, cost=0.0, updated=False)
            rows, columns = self._lines(structure.reader)
            cost = costs[key][gone].clamp(min=0).sum().item()
            columns = columns.index_fill(0, structure.columns[gone].flatten(), True)
            removed[structure.reader] = Removed(rows, columns, cost)
        return removed

    def remove(self, weight: Tensor, keep: Tensor, decision: Removed, seen: Scores, inverses: Inverses) -> Left:
        return remove_lines(weight, keep, decision, inverses, self.task.settings.update)

    def _lines(self, layer: str) -> tuple[Tensor, Tensor]:
        """bool [R] and bool [C], all False."""
        rows, width = self.task.source.layers[layer]
        return torch.zeros(rows, dtype=torch.bool), torch.zeros(width, dtype=torch.bool)


def find_coupled(task: Task) -> Coupled:
    """The structures of the kinds that the pattern names.

    Raises:
        Problem: the model's blocks do not have them, or none is free of dense layers.
    """
    assert isinstance(task.pattern, Structured)
    kinds = [kind for kind in KINDS if kind in task.pattern.kinds]
    found = find_structures(task.source, kinds)
    free = {
        key: structure
        for key, structure in found.items()
        if all(task.quotas[layer].most for layer in (structure.reader, *structure.writers))
    }
    return Coupled(task, free)


def write_smaller(latest: Checkpoint, way: Coupled, writer: CheckpointWriter) -> Shrunk:
    """Writes `latest`, whose structures are masked, without them."""
    assert isinstance(way.task.pattern, Structured)
    found = find_structures(way.task.source, [kind for kind in KINDS if kind in way.task.pattern.kinds])
    packed, kept = latest.masks(), dict[Key, Tensor]()
    for key, structure in found.items():
        keep = latest.block_masks(key[0], {structure.reader: packed[structure.reader]})[structure.reader]
        kept[key] = keep[:, structure.columns].any(0).any(1).nonzero().flatten()
    config = read_config(latest.folder)
    widths = {key[1]: counts(config, structure, way.task.settings.multiple) for key, structure in found.items()}
    return shrink(latest, writer, found, kept, widths)
