"""How many coupled structures each block keeps: the same number in all, or what one threshold leaves."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from compression.core.errors import Problem
from compression.surgeon.structures import Key, Kind

WHERE = "params.yaml: prune.sparsity"


def allot(
    costs: Mapping[Key, Tensor],
    weights: Mapping[Key, int],
    counts: Mapping[Kind, Sequence[int]],
    budget: int,
    same: bool,
    depth: int,
) -> dict[Key, Tensor]:
    """Which structures stay so that at least `budget` weights go; within a block, the cheapest of a kind go first.

    Args:
        costs: of removing each structure [n] by block and kind; blocks that stay dense are not among them. What is gone
            already costs nothing, or less, so that it goes first.
        weights: of one structure.
        counts: how many of a kind may stay in a block, ascending; see structures.counts.
        same: the same number in every block: of all pairs of counts (one of each kind) that remove enough, the one of
            least summed cost; of equals the one that removes least. Otherwise the cheapest by cost per weight go,
            wherever they are, but no block keeps fewer than the least of `counts`; of equals the earlier one goes.
        depth: number of blocks.

    Returns:
        indices int64 of what stays, ascending.

    Raises:
        Problem: so much cannot go; no count is given; or `same` where some blocks are dense, or wider than others.
    """
    for kind in {kind for _, kind in costs}:
        if not counts[kind]:
            raise Problem(
                WHERE,
                f"no number of {kind} that may stay in a block is left",
                "ask for less, or for a multiple of less",
            )
    left = _same(costs, weights, counts, budget, depth) if same else _threshold(costs, weights, counts, budget)
    return {key: cost.sort(stable=True).indices[len(cost) - left[key] :].sort().values for key, cost in costs.items()}


def _same(
    costs: Mapping[Key, Tensor],
    weights: Mapping[Key, int],
    counts: Mapping[Kind, Sequence[int]],
    budget: int,
    depth: int,
) -> dict[Key, int]:
    kinds = list(dict.fromkeys(kind for _, kind in costs))
    choices: list[tuple[float, int, dict[Kind, int]]] = [(0.0, 0, {})]  # cost, weights that go, what stays of each kind
    for kind in kinds:
        mine = [key for key in costs if key[1] == kind]
        number = len(costs[mine[0]])
        if len(mine) != depth or any(len(costs[key]) != number for key in mine):
            raise Problem(
                "params.yaml: prune",
                f"the same width in every block is asked for, but some blocks keep all their {kind}",
                f"let every block or none lose {kind}, or let widths differ",
            )
        # What it costs in all to remove the n cheapest of each block.
        summed = torch.stack([costs[key].double().sort().values.cumsum(0) for key in mine]).sum(0).tolist()
        choices = [
            (cost + (summed[number - stay - 1] if stay < number else 0.0), gone + (number - stay) * size, left)
            for cost, gone, others in choices
            for stay in counts[kind]
            for size in [sum(weights[key] for key in mine)]
            for left in [{**others, kind: stay}]
        ]
    _reachable(budget, max(gone for _, gone, _ in choices))
    _, _, best = min((choice for choice in choices if choice[1] >= budget), key=lambda choice: choice[:2])
    return {key: best[key[1]] for key in costs}


def _threshold(
    costs: Mapping[Key, Tensor], weights: Mapping[Key, int], counts: Mapping[Kind, Sequence[int]], budget: int
) -> dict[Key, int]:
    left = {key: len(cost) for key, cost in costs.items()}
    least = {key: min(counts[key[1]]) for key in costs}
    _reachable(budget, sum(weights[key] * (left[key] - least[key]) for key in costs))
    keys = [key for key, cost in costs.items() for _ in range(len(cost))]
    ranked = torch.cat([cost.double() / weights[key] for key, cost in costs.items()]).sort(stable=True).indices
    gone = 0
    for place in ranked.tolist():
        if gone >= budget:
            break
        key = keys[place]
        if left[key] > least[key]:
            left[key] -= 1
            gone += weights[key]
    return left


def _reachable(budget: int, most: int) -> None:
    if budget > most:
        raise Problem(WHERE, f"{budget} weights are to go, but structures can give up no more than {most}")
