"""Rows (outputs, with their bias) and columns (inputs) of each linear go, whatever reads or writes them.

The tensor keeps its shape: what no other layer loses with it cannot be cut out. See coupled.py for what can.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from compression.pruning.pattern import Structured
from compression.surgeon import updates
from compression.surgeon.costs import column_costs, row_costs
from compression.surgeon.factors import Factors, Inverses
from compression.surgeon.threshold import structured
from compression.surgeon.way import Looks, Task


class Removed(NamedTuple):
    """What has gone from a layer: rows bool [R] and columns bool [C]."""

    rows: Tensor
    columns: Tensor


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
        return {layer: Removed(rows, columns) for layer, (rows, columns) in found.items()}

    def remove(
        self,
        layer: str,
        weight: Tensor,
        keep: Tensor,
        decision: Removed,
        seen: Mapping[str, Tensor],
        inverses: Inverses,
    ) -> tuple[Tensor, Tensor, float]:
        rows, columns = decision.rows.to(keep.device), decision.columns.to(keep.device)
        gone = {"rows": rows, "columns": columns}
        cost = sum(scores[gone[name]].sum().item() for name, scores in seen.items())
        new = remove_lines(weight, rows, columns, inverses, self.task.settings.update)
        return new, keep & ~rows[:, None] & ~columns, cost


def remove_lines(weight: Tensor, rows: Tensor, columns: Tensor, inverses: Inverses, update: str) -> Tensor:
    """W' [R, c] without rows [R] and columns [C], what stays updated as Settings.update says."""
    columns = torch.cat([columns, columns.new_zeros(weight.shape[1] - len(columns))])  # the bias stays
    if update == "none":
        return weight.masked_fill(rows[:, None] | columns, 0)
    if update == "independent":
        return updates.remove_lines_independently(weight, inverses.outputs, inverses.inputs, rows, columns)
    return updates.remove_rows_and_columns(weight, inverses.outputs, inverses.inputs, rows, columns)
