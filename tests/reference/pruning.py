"""Masks by looping over rows, and one-pass pruning by running the whole model once a layer."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from compression.pruning.pattern import NofM, Pattern, Unstructured


def row_counts(rows: int, width: int, sparsity: float) -> list[int]:
    """How many weights each row drops: the first r + 1 rows together owe their share, rounded down."""
    return spread(round(sparsity * rows * width), rows)


def spread(total: int, rows: int) -> list[int]:
    """`total` over the rows: the first r + 1 together have their share, rounded down."""
    counts: list[int] = []
    for row in range(rows):
        counts.append((row + 1) * total // rows - sum(counts))
    return counts


def keep_highest(score: Tensor, pattern: Pattern) -> Tensor:
    """Mask bool [out, in]; among equal scores the earlier column goes first."""
    rows, width = score.shape
    if isinstance(pattern, Unstructured) and pattern.scope == "adaptive":
        score = cumulated_shares(score)
    table = score.double().tolist()
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


def cumulated_shares(score: Tensor) -> Tensor:
    """float64 [out, in]: what an entry and those below it in its row are of the row's sum; 0 in a row of zeros."""
    shares = torch.zeros(score.shape, dtype=torch.float64)
    for row, entries in enumerate(score.double().tolist()):
        total = 0.0
        for column in sorted(range(len(entries)), key=lambda column: (entries[column], column)):
            total += entries[column]
            shares[row, column] = total
        shares[row] /= total or 1
    return shares


def adaptive_by_bisection(score: Tensor, total: int) -> Tensor:
    """Wanda's variant as its authors have it: alpha is halved in until every row's share alpha makes `total` drops."""
    low, high = 0.0, 1.0
    ordered = score.double().sort(dim=1)
    sums = ordered.values.cumsum(1)
    for _ in range(200):
        alpha = (low + high) / 2
        counts = (sums <= alpha * sums[:, -1:]).sum(1)
        if int(counts.sum()) == total:
            break
        low, high = (alpha, high) if int(counts.sum()) < total else (low, alpha)
    keep = torch.ones(score.shape, dtype=torch.bool)
    for row, count in enumerate(counts.tolist()):
        keep[row, ordered.indices[row, :count]] = False
    return keep


def magnitude(weight: Tensor, inputs: Tensor | None, pattern: Pattern) -> Tensor:
    return keep_highest(weight.double().abs(), pattern)


def wanda(weight: Tensor, inputs: Tensor, pattern: Pattern) -> Tensor:
    """|W_ij| times the l2 norm of feature j over all tokens of inputs [tokens, in]."""
    norms = [sum(x * x for x in column) ** 0.5 for column in inputs.double().t().tolist()]
    return keep_highest(weight.double().abs() * torch.tensor(norms, dtype=torch.float64), pattern)


METHODS = {"magnitude": magnitude, "wanda": wanda}

Prune = Callable[[Tensor, Tensor, Pattern], tuple[Tensor, Tensor]]


def masked_wanda(weight: Tensor, inputs: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    keep = wanda(weight, inputs, pattern)
    return weight * keep, keep


@torch.no_grad()
def inputs_of(model: nn.Module, layer: str, ids: Tensor) -> Tensor:
    """[tokens, in]: what the layer is given when the model runs as it stands."""
    taken: list[Tensor] = []
    hook = model.get_submodule(layer).register_forward_pre_hook(lambda _, given: taken.append(given[0]))
    model(input_ids=ids)
    hook.remove()
    return taken[0].flatten(0, -2)


@torch.no_grad()
def prune_model(
    model: nn.Module, steps: list[list[str]], ids: Tensor, pattern: Pattern, prune: Prune = masked_wanda
) -> dict[str, Tensor]:
    """In place, some layers at a time; each is scored behind all that earlier steps have pruned."""
    masks = {}
    for layers in steps:
        inputs = [inputs_of(model, layer, ids) for layer in layers]
        for layer, seen in zip(layers, inputs, strict=True):
            weight = model.get_parameter(f"{layer}.weight")
            pruned, masks[layer] = prune(weight, seen, pattern)
            weight.copy_(pruned)
    return masks
