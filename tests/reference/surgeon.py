"""LLM Surgeon the slow way, in float64: the whole matrix G (x) A, and a system of equations for what is free to move.

Weights are [rows, columns], bias included; vectors of them are row by row, as torch flattens.
"""

from collections.abc import Iterable, Mapping
from math import inf

import torch
from torch import Tensor


def mean_of_squares(vectors: Tensor) -> Tensor:
    """A or G [n, n] of vectors [tokens, n]."""
    found = torch.zeros(vectors.shape[1], vectors.shape[1], dtype=torch.float64)
    for vector in vectors.double():
        found += torch.outer(vector, vector) / len(vectors)
    return found


def damped(matrix: Tensor, share: float) -> Tensor:
    return matrix + share * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=torch.float64)


def rise(G: Tensor, A: Tensor, change: Tensor) -> float:
    """Half of vec(dW)^T (G (x) A) vec(dW)."""
    flat = change.double().flatten()
    return float(flat @ torch.kron(G, A) @ flat / 2)


def surgery(weight: Tensor, G: Tensor, A: Tensor, removed: Tensor) -> Tensor:
    """The weight for which the rise is least, with zeros where `removed`. No OBS formula: F_SS d_S = -F_Sq d_q."""
    F, gone = torch.kron(G, A), removed.flatten()
    change = torch.where(gone, -weight.double().flatten(), 0.0)
    if not gone.all():
        change[~gone] = -torch.linalg.solve(F[~gone][:, ~gone], F[~gone] @ change)
    return weight + change.view_as(weight)


def in_turns(weight: Tensor, G: Tensor, A: Tensor, removed: Tensor, turns: Iterable[slice]) -> Tensor:
    """Surgery of some rows after others, each from what those before have left; zeros in the end."""
    found = weight.double()
    for rows in turns:
        own = torch.zeros_like(removed)
        own[rows] = removed[rows]
        found = surgery(found, G, A, own)
    return found.masked_fill(removed, 0)


def one_by_one(weight: Tensor, G: Tensor, A: Tensor, parts: Iterable[Tensor]) -> Tensor:
    """The sum of what surgery of each part (bool masks) alone would change; zeros in the end."""
    found, gone = weight.double(), torch.zeros(weight.shape, dtype=torch.bool)
    for part in parts:
        found = found + surgery(weight, G, A, part) - weight
        gone |= part
    return found.masked_fill(gone, 0)


def threshold(
    costs: Mapping[str, tuple[list[float], list[float]]], budget: int, most: Mapping[str, int]
) -> dict[str, Tensor]:
    """By layer, bool [rows, columns] of what goes, by trying each structure in turn and counting what is gone.

    What costs infinitely much stays.
    """
    gone = {layer: torch.zeros(len(rows), len(columns), dtype=torch.bool) for layer, (rows, columns) in costs.items()}
    order = sorted(
        (cost, number, side, place)
        for number, sides in enumerate(costs.values())
        for side, own in enumerate(sides)
        for place, cost in enumerate(own)
        if cost < inf
    )
    for _, number, side, place in order:
        if sum(int(own.sum()) for own in gone.values()) >= budget:
            break
        layer = list(costs)[number]
        tried = gone[layer].clone()
        tried.select(side, place).fill_(True)
        if int(tried.sum()) <= most[layer] and not tried.all():
            gone[layer] = tried
    return gone
