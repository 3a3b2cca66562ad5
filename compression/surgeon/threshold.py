"""Which rows and columns go, in all layers at once: the cheapest, until enough weights have gone."""

from collections.abc import Mapping

import torch
from torch import Tensor

from compression.core.errors import Problem


def structured(
    costs: Mapping[str, tuple[Tensor | None, Tensor | None]],
    shapes: Mapping[str, tuple[int, int]],
    budget: int,
    most: Mapping[str, int],
) -> dict[str, tuple[Tensor, Tensor]]:
    """One threshold for all rows and columns of all layers (arXiv 2312.17244, section 3.2), walked up to from below.

    With n rows and m columns a layer R x C loses n C + m R - n m weights. A row or column is passed over if it would
    bring its layer above `most`, or be the last that the layer has. Among equal costs the earlier layer goes first,
    then rows, then the lower index.

    Args:
        costs: by layer, of its rows [R] and its columns [C]; None: those stay.
        shapes: (R, C) by layer.
        budget: weights that go in all, at least; the last row or column is the one that reaches it.
        most: weights that a layer may lose.

    Returns:
        by layer, bool [R] and bool [C], True for what goes.

    Raises:
        Problem: the budget cannot be reached.
    """
    sides = [(layer, side, own) for layer, both in costs.items() for side, own in enumerate(both) if own is not None]
    order = torch.cat([torch.empty(0), *(own.cpu() for *_, own in sides)]).argsort(stable=True)
    owners = torch.cat([torch.full((len(own),), number) for number, (*_, own) in enumerate(sides)] or [order])[order]
    places = torch.cat([torch.arange(len(own)) for *_, own in sides] or [order])[order]

    gone: dict[str, tuple[list[int], list[int]]] = {layer: ([], []) for layer in costs}  # rows, columns
    lost = dict.fromkeys(costs, 0)
    total = 0
    for owner, place in zip(owners.tolist(), places.tolist(), strict=True):
        if total >= budget:
            break
        layer, side, _ = sides[owner]
        own, across = gone[layer][side], gone[layer][1 - side]
        weights = shapes[layer][1 - side] - len(across)
        if lost[layer] + weights <= most[layer] and len(own) + 1 < shapes[layer][side]:
            own.append(place)
            lost[layer] += weights
            total += weights
    if total < budget:
        raise Problem(
            "params.yaml: prune.sparsity",
            f"{budget} weights cannot go with whole rows and columns, {total} can",
            "lower the sparsity, or let more go of a layer",
        )
    return {
        layer: (_mask(shapes[layer][0], rows), _mask(shapes[layer][1], columns))
        for layer, (rows, columns) in gone.items()
    }


def _mask(size: int, places: list[int]) -> Tensor:
    mask = torch.zeros(size, dtype=torch.bool)
    mask[places] = True
    return mask
