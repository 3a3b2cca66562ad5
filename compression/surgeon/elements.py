"""Single weights go: the cheapest of all, or N:M, where groups take on the pattern one after the other."""

from dataclasses import dataclass

import torch
from torch import Tensor

from compression.pruning.allocation import global_counts, project_within
from compression.pruning.pattern import NofM, Unstructured
from compression.pruning.select import keep_highest
from compression.surgeon import updates
from compression.surgeon.costs import element_costs, group_costs_nofm
from compression.surgeon.factors import Factors, Inverses
from compression.surgeon.way import Left, Looks, Scores, Task

GONE = 0.0  # the score of what an earlier shot has dropped; whatever is left scores more
LEFT = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Elements:
    """See way.py; a decision is the number of elements, or of groups of N:M, that have gone from a layer."""

    task: Task

    def layers(self) -> list[str]:
        return [layer for layer, quota in self.task.quotas.items() if quota.most]

    def look(self, layer: str, weight: Tensor, keep: Tensor, factors: Factors, inverses: Inverses) -> dict[str, Tensor]:
        """`elements` [R, C]: what each weight costs."""
        costs = element_costs(weight, factors, inverses, self.task.updating)[:, : keep.shape[1]]
        return {"elements": costs.clamp(min=LEFT).masked_fill(~keep, GONE)}

    def decide(self, looks: Looks, share: float) -> dict[str, int]:
        pattern, quotas = self.task.pattern, self.task.quotas
        if isinstance(pattern, NofM):
            # All layers end with the same pattern, so that the threshold only says which groups are the first.
            groups = sum(quota.size // pattern.of for quota in quotas.values() if quota.dropped)
            ranked = lambda: ((layer, _grouped(seen["elements"], pattern)) for layer, seen in looks())  # noqa: E731
            return global_counts(ranked, round(share * groups))
        if not self.task.together:
            return {layer: round(share * quotas[layer].dropped) for layer in self.layers()}
        found = global_counts(lambda: ((layer, seen["elements"]) for layer, seen in looks()), self.task.due(share))
        gone = {layer: int((seen["elements"] == GONE).count_nonzero()) for layer, seen in looks()}
        # What has gone stays gone, and the least is reached in equal steps, as the quota is.
        bounds = {layer: (max(int(share * quotas[layer].least), gone[layer]), quotas[layer].most) for layer in gone}
        sizes = {layer: quotas[layer].size for layer in gone}
        wanted = {layer: found[layer] / sizes[layer] for layer in gone}
        return project_within(wanted, sizes, self.task.due(share), bounds)

    def remove(self, weight: Tensor, keep: Tensor, decision: int, seen: Scores, inverses: Inverses) -> Left:
        scores, pattern, settings = seen["elements"], self.task.pattern, self.task.settings
        if isinstance(pattern, NofM):
            groups = _grouped(scores, pattern)
            whole = keep_highest(groups, Unstructured(decision / groups.numel(), "layer"))
            left = keep_highest(scores, pattern) | whole.repeat_interleave(pattern.of, 1)
        else:
            left = keep_highest(scores, Unstructured(decision / scores.numel(), "layer"))
        cost = scores[~left].sum(dtype=torch.float64).item()
        if settings.update == "none":
            new = weight.clone()
            new[:, : left.shape[1]] *= left
        elif settings.update == "independent":
            new = updates.remove_elements_independently(weight, inverses.outputs, inverses.inputs, left)
        else:
            new = updates.remove_elements(weight, inverses.outputs, inverses.inputs, left, settings.correlate)
        return new, left, cost


def _grouped(scores: Tensor, pattern: NofM) -> Tensor:
    return group_costs_nofm(scores, pattern.keep, pattern.of)
