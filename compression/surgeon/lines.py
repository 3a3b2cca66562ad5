"""Rows (outputs, with their bias) and columns (inputs) of each linear go, whatever reads or writes them.

The tensor keeps its shape: what no other layer loses with it cannot be cut out. See coupled.py for what can.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from compression.pruning.pattern import Structured
from compression.surgeon import updates
from compression.surgeon.costs import column_costs, row_costs
from compression.surgeon.factors import Factors, Inverses
from compression.surgeon.threshold import structured
from compression.surgeon.way import Left, Looks, Scores, Task


class Removed(NamedTuple):
    """What has gone from a layer after a shot.

    Attributes:
        rows, columns: bool [R] and bool [C].
        cost: what that was predicted to cost, each for itself; nothing for what had gone before.
        updated: whether the rest makes up for it.
    """

    rows: Tensor
    columns: Tensor
    cost: float
    updated: bool = True


@dataclass(frozen=True)
class Lines:
    """See way.py."""

    task: Task

    def layers(self) -> list[str]:
        return [layer for layer, quota in self.task.quotas.items() if quota.most]

    def look(self, layer: str, weight: Tensor, keep: Tensor, factors: Factors, inverses: Inverses) -> dict[str, Tensor]:
        """`rows` [R] and `columns` [C], what each costs; those that are asked for."""
        assert isinstance(self.task.pattern, Structured)
        found = {}
        if "rows" in self.task.pattern.kinds:
            costs = row_costs(weight, factors, inverses, self.task.updating)
            found["rows"] = costs.masked_fill(~keep.any(1), 0)
        if "columns" in self.task.pattern.kinds:
            costs = column_costs(weight, factors, inverses, self.task.updating)[: keep.shape[1]]
            found["columns"] = costs.masked_fill(~keep.any(0), 0)
        return found

    def decide(self, looks: Looks, share: float) -> dict[str, Removed]:
        quotas = self.task.quotas
        costs = {layer: (seen.get("rows"), seen.get("columns")) for layer, seen in looks()}
        shapes = {layer: (self.task.source.layers[layer][0], self.task.source.layers[layer][1]) for layer in costs}
        if self.task.together:
            found = structured(costs, shapes, self.task.due(share), {layer: quotas[layer].most for layer in costs})
        else:
            found = {}
            for layer, own in costs.items():
                due, size = round(share * quotas[layer].dropped), quotas[layer].size
                found |= structured({layer: own}, {layer: shapes[layer]}, due, {layer: size})
        return {layer: Removed(*gone, _cost(costs[layer], gone)) for layer, gone in found.items()}

    def remove(self, weight: Tensor, keep: Tensor, decision: Removed, seen: Scores, inverses: Inverses) -> Left:
        return remove_lines(weight, keep, decision, inverses, self.task.settings.update)


def remove_lines(weight: Tensor, keep: Tensor, removed: Removed, inverses: Inverses, update: str) -> Left:
    """What Way.remove gives: W' [R, c] without rows and columns, the rest updated as Settings.update says."""
    rows, columns = removed.rows.to(keep.device), removed.columns.to(keep.device)
    left = keep & ~rows[:, None] & ~columns
    columns = torch.cat([columns, columns.new_zeros(weight.shape[1] - len(columns))])  # the bias stays
    if update == "none" or not removed.updated:
        return weight.masked_fill(rows[:, None] | columns, 0), left, removed.cost
    one = updates.remove_lines_independently if update == "independent" else updates.remove_rows_and_columns
    return one(weight, inverses.outputs, inverses.inputs, rows, columns), left, removed.cost


def _cost(costs: tuple[Tensor | None, Tensor | None], gone: tuple[Tensor, Tensor]) -> float:
    pairs = zip(costs, gone, strict=True)
    return sum(own[lines.to(own.device)].sum().item() for own, lines in pairs if own is not None)
