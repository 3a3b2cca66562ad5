"""Dimensions of the residual stream go, from every layer, the embedding and the head: the model gets narrower.

What one costs is summed over all layers: what its row costs where a layer writes the stream (o and down), what its
column costs where one reads it (q, k, v, gate and up), each as if it went from that layer alone; and each layer makes
up for its own loss. Embedding and head have no curvature: what they lose is not counted, nor made up for. Nor is it
that norms divide by less once a dimension has gone, which a row's cost knows as a small change only. So the sum ranks
dimensions, and shots measure anew what is left, but it is no forecast of the loss.

During the shots all tensors keep their shapes; hidden.py cuts in the end.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from compression.core import masks
from compression.core.checkpoint import Checkpoint, CheckpointWriter
from compression.core.errors import Problem
from compression.surgeon.costs import column_costs, row_costs
from compression.surgeon.factors import Factors, Inverses
from compression.surgeon.hidden import Axes, Narrowed, hidden_axes, hidden_widths, narrow, remove_dimensions
from compression.surgeon.lines import Removed, remove_lines
from compression.surgeon.way import Left, Looks, Scores, Task

GONE = -1.0  # the score of what an earlier shot has removed: it goes first, even before what costs nothing


@dataclass(frozen=True)
class Stream:
    """See way.py.

    Attributes:
        axes: which axes of which tensors are the stream.
        widths: that may be left of it, ascending; the last one is the model's.
    """

    task: Task
    axes: Axes
    widths: list[int]

    def layers(self) -> list[str]:
        return [layer for layer in self.task.quotas if f"{layer}.weight" in self.axes]

    def look(self, layer: str, weight: Tensor, keep: Tensor, factors: Factors, inverses: Inverses) -> dict[str, Tensor]:
        """`stream` [hidden width]: what each dimension costs in this layer."""
        if self.reads(layer):
            costs = column_costs(weight, factors, inverses, self.task.updating)[: keep.shape[1]]
            return {"stream": costs.masked_fill(~keep.any(0), GONE)}
        costs = row_costs(weight, factors, inverses, self.task.updating)
        return {"stream": costs.masked_fill(~keep.any(1), GONE)}

    def decide(self, looks: Looks, share: float) -> dict[str, Removed]:
        costs = {layer: seen["stream"].cpu() for layer, seen in looks()}
        total = torch.stack([own.double() for own in costs.values()]).sum(0)
        gone = torch.zeros(len(total), dtype=torch.bool)
        gone[total.argsort(stable=True)[: len(total) - self.left(share)]] = True
        removed = {}
        for layer in self.layers():
            rows, columns = (torch.zeros(size, dtype=torch.bool) for size in self.task.source.layers[layer])
            both = (rows, gone) if self.reads(layer) else (gone, columns)
            removed[layer] = Removed(*both, costs[layer][gone].clamp(min=0).sum().item())
        return removed

    def remove(self, weight: Tensor, keep: Tensor, decision: Removed, seen: Scores, inverses: Inverses) -> Left:
        return remove_lines(weight, keep, decision, inverses, self.task.settings.update)

    def outer(self, tensors: Mapping[str, Tensor], decisions: Mapping[str, Removed]) -> dict[str, Tensor]:
        """Embedding and head without what was decided on."""
        gone = next(own.columns for layer, own in decisions.items() if self.reads(layer))
        return remove_dimensions(tensors, self.axes, gone.nonzero().flatten())

    def left(self, share: float) -> int:
        """The hidden width after a shot, once `share` of the quotas is due; the last one is one that may be left.

        Raises:
            Problem: none that may be left is narrow enough.
        """
        width = self.widths[-1]
        each = sum(self.task.quotas[layer].size for layer in self.layers()) // width  # weights of a dimension
        left = width - ceil(self.task.due(share) / each)
        if share < 1:
            return left
        if left < self.widths[0]:
            raise Problem(
                "params.yaml: prune.sparsity",
                f"leaves {left} of {width} dimensions, fewer than surgeon.multiple and the model's heads allow",
                f"valid: up to {1 - self.widths[0] / width:.4f}, which leaves {self.widths[0]}",
            )
        return max(wide for wide in self.widths if wide <= left)

    def reads(self, layer: str) -> bool:
        """Whether the layer reads the stream; else it writes it."""
        return self.axes[f"{layer}.weight"] == (1,)


def find_stream(task: Task) -> Stream:
    """The residual stream of a model whose hidden width can change.

    Raises:
        Problem: it cannot; layers that are to stay dense; a sparsity that cannot be reached.
    """
    widths = hidden_widths(task.source, task.settings.multiple)
    dense = [layer for layer, quota in task.quotas.items() if not quota.most]
    if dense and len(dense) < len(task.quotas):
        raise Problem(
            "params.yaml: allocate.dense",
            f"{dense[0]} is to stay as it is, but every layer has a part in every dimension of the hidden states",
            "valid: [], or another prune.pattern than hidden",
        )
    if len(widths) == 1:
        raise Problem(
            "params.yaml: surgeon.multiple",
            f"transformers takes no hidden width below {widths[0]} that is a multiple of {task.settings.multiple}",
            "in many families the heads have to divide it: valid are multiples of their number",
        )
    stream = Stream(task, hidden_axes(task.source, widths[0]), widths)
    stream.left(1)
    return stream


def write_narrower(latest: Checkpoint, way: Stream, writer: CheckpointWriter) -> Narrowed:
    """Writes `latest`, of whose stream dimensions are masked, without them."""
    layer = next(layer for layer in way.layers() if way.reads(layer))
    keep = masks.unpack(latest.masks()[layer], latest.layers[layer][1])
    return narrow(latest, writer, keep.any(0).nonzero().flatten())
