"""Masks by looping over rows, and one-pass pruning by running the whole model once a layer."""

import torch
from torch import Tensor, nn

from compression.pruning.pattern import NofM, Pattern


def row_counts(rows: int, width: int, sparsity: float) -> list[int]:
    """How many weights each row drops: the first r + 1 rows together owe their share, rounded down."""
    total = round(sparsity * rows * width)
    counts: list[int] = []
    for row in range(rows):
        counts.append((row + 1) * total // rows - sum(counts))
    return counts


def keep_highest(score: Tensor, pattern: Pattern) -> Tensor:
    """Mask bool [out, in]; among equal scores the earlier column goes first."""
    table = score.double().tolist()
    rows, width = score.shape
    keep = torch.ones(rows, width, dtype=torch.bool)
    if isinstance(pattern, NofM):
        for row in range(rows):
            for start in range(0, width, pattern.of):
                group = sorted(range(start, start + pattern.of), key=lambda column: (table[row][column], column))
                keep[row, group[: pattern.of - pattern.keep]] = False
    elif pattern.scope == "row":
        for row, count in enumerate(row_counts(rows, width, pattern.sparsity)):
            keep[row, sorted(range(width), key=lambda column: (table[row][column], column))[:count]] = False
    else:
        places = [(row, column) for row in range(rows) for column in range(width)]
        places.sort(key=lambda place: (table[place[0]][place[1]], place))
        for row, column in places[: round(pattern.sparsity * rows * width)]:
            keep[row, column] = False
    return keep


def magnitude(weight: Tensor, inputs: Tensor | None, pattern: Pattern) -> Tensor:
    return keep_highest(weight.double().abs(), pattern)


def wanda(weight: Tensor, inputs: Tensor, pattern: Pattern) -> Tensor:
    """|W_ij| times the l2 norm of feature j over all tokens of inputs [tokens, in]."""
    norms = [sum(x * x for x in column) ** 0.5 for column in inputs.double().t().tolist()]
    return keep_highest(weight.double().abs() * torch.tensor(norms, dtype=torch.float64), pattern)


METHODS = {"magnitude": magnitude, "wanda": wanda}


@torch.no_grad()
def inputs_of(model: nn.Module, layer: str, ids: Tensor) -> Tensor:
    """[tokens, in]: what the layer is given when the model runs as it stands."""
    taken: list[Tensor] = []
    hook = model.get_submodule(layer).register_forward_pre_hook(lambda _, given: taken.append(given[0]))
    model(input_ids=ids)
    hook.remove()
    return taken[0].flatten(0, -2)


@torch.no_grad()
def prune_model(model: nn.Module, layers: list[str], ids: Tensor, pattern: Pattern) -> dict[str, Tensor]:
    """Wanda, a layer at a time, in place; each layer is scored behind all that were pruned before it."""
    masks = {}
    for layer in layers:
        weight = model.get_parameter(f"{layer}.weight")
        masks[layer] = wanda(weight, inputs_of(model, layer, ids), pattern)
        weight.mul_(masks[layer])
    return masks
