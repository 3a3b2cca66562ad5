"""LLM Surgeon's structured pruning as its released code goes about it, re-stated from its description.

Symbols: W [R, C] a linear's weight; A [C, C] second moment of its inputs; G [R, R] of the loss's gradients at its
outputs; P and Q the inverses of the damped G and A.

The whole model in float32, eager attention, one sequence at a time. Hooks collect A and G of the prunable layers only,
but the backward pass goes through the whole model, with a gradient for every parameter. One threshold over all rows
and columns of all layers, by a dense table of layers x structures; updates through eigendecompositions of both
factors, rows and columns each from the weight before the shot. It stands for that code in benchmarks/surgeon.py.

Kept though they hurt: with `activations` each sequence overwrites the one before, so the last alone counts; whatever
is not a number costs 0 and goes first; row and column updates are added up though they know nothing of each other.

Left out: single weights and 2:4, biases (SmolLM2 has none), sampled labels, the nearest Kronecker product and sums
of several, updates in groups (`max_correlate`: here all rows go together, and all columns, as in the published
structured runs), fresh samples a shot, LoRA, and judging the model after every shot, which is no part of pruning.
Sequences are handed in, where the original cuts them at random places out of its training text.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

KINDS = ("kfac", "activations", "identity")
DAMPING = 0.01


@dataclass
class Factors:
    """G [R, R] and A [C, C] of a layer."""

    G: Tensor
    A: Tensor


@dataclass
class Damped:
    """Damped factors and their inverses, of what is alive in a layer."""

    G: Tensor
    A: Tensor
    P: Tensor
    Q: Tensor


def prune(
    source: Path,
    kind: str,
    ids: Tensor,
    folder: Path,
    blocks: Collection[int],
    sparsity: float,
    shots: int,
    obd: bool,
) -> None:
    """Zeroes rows and columns of the linears in `blocks` of `source`, and writes the model to `folder`.

    Args:
        kind: of KINDS; `identity` is magnitude, and needs `obd`.
        ids: calibration tokens int64 [N, T].
        sparsity: share of these linears' weights that go; shot k of K aims at k / K of it.
        obd: diagonal costs and no update, in place of those of the inverse (OBS) with it.
    """
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager").eval()
    layers = {
        f"{index}.{name}": module
        for index in blocks
        for name, module in model.model.layers[index].named_modules()
        if isinstance(module, nn.Linear)
    }
    for shot in range(1, shots + 1):
        take_shot(layers, collect(model, layers, kind, ids), kind, sparsity * shot / shots, obd)
    model.save_pretrained(folder)


def collect(model: Any, layers: Mapping[str, nn.Linear], kind: str, ids: Tensor) -> dict[str, Factors]:
    """The factors of all layers at the weights as they are."""
    found = {
        name: Factors(torch.eye(layer.out_features), torch.eye(layer.in_features)) for name, layer in layers.items()
    }
    if kind == "identity":
        return found
    hooks = []
    for name, layer in layers.items():
        if kind == "activations":
            hooks.append(layer.register_forward_hook(overwrite_inputs(found[name])))
        else:
            found[name].A.zero_()
            found[name].G.zero_()
            hooks.append(layer.register_forward_hook(add_inputs(found[name])))
            hooks.append(layer.register_full_backward_hook(add_gradients(found[name])))
    for row in ids[:, None].unbind():
        if kind == "activations":
            with torch.no_grad():
                model(input_ids=row, use_cache=False)
        else:
            model.zero_grad()
            model(input_ids=row, labels=row, use_cache=False).loss.backward()
    model.zero_grad()
    for hook in hooks:
        hook.remove()
    if kind == "kfac":
        for factors in found.values():
            balance(factors, ids.numel())
    return found


def overwrite_inputs(factors: Factors) -> Callable[..., None]:
    def hook(_: nn.Module, given: tuple[Tensor, ...], __: Tensor) -> None:
        a = given[0].flatten(0, -2)
        factors.A = a.t() @ a / len(a)

    return hook


def add_inputs(factors: Factors) -> Callable[..., None]:
    def hook(_: nn.Module, given: tuple[Tensor, ...], __: Tensor) -> None:
        a = given[0].detach().flatten(0, -2)
        factors.A += a.t() @ a

    return hook


def add_gradients(factors: Factors) -> Callable[..., None]:
    def hook(_: nn.Module, __: tuple[Tensor, ...], given: tuple[Tensor, ...]) -> None:
        g = given[0].flatten(0, -2).nan_to_num()
        factors.G += g.t() @ g

    return hook


def balance(factors: Factors, tokens: int) -> None:
    """Sums over tokens become means, and both factors get the same Frobenius norm; their product stays."""
    factors.A /= tokens
    factors.G /= tokens
    a, g = factors.A.norm(), factors.G.norm()
    factors.A *= (g / a).sqrt() if a * g else 0
    factors.G *= (a / g).sqrt() if a * g else 0


@torch.no_grad()
def take_shot(
    layers: Mapping[str, nn.Linear], factors: Mapping[str, Factors], kind: str, sparsity: float, obd: bool
) -> None:
    """Prunes all layers up to `sparsity`."""
    alive, damped, costs = {}, {}, {}
    for name, layer in layers.items():
        W, own = layer.weight.data, factors[name]
        rows = (W != 0).any(1) & (own.G.diagonal() != 0)
        columns = (W != 0).any(0) & (own.A.diagonal() != 0)
        alive[name] = (rows, columns)
        G, A = own.G[rows][:, rows], own.A[columns][:, columns]
        if not obd:
            (G_d, P), (A_d, Q) = damp_and_invert(G), damp_and_invert(A)
            damped[name] = Damped(G_d, A_d, P, Q)
        row_costs, column_costs = structure_costs(W[rows][:, columns], G, A, damped.get(name), kind)
        costs[name] = (torch.zeros(len(rows)), torch.zeros(len(columns)))
        costs[name][0][rows] = row_costs.nan_to_num()
        costs[name][1][columns] = column_costs.nan_to_num()
    tau = threshold(costs, sparsity)
    for name, layer in layers.items():
        W, (rows, columns) = layer.weight.data, alive[name]
        lost_rows, lost_columns = costs[name][0] <= tau, costs[name][1] <= tau
        if not obd:
            part = W[rows][:, columns]
            part += update(part, damped[name], lost_rows[rows], lost_columns[columns])
            W[rows.nonzero(), columns.nonzero()[:, 0]] = part
        W[lost_rows | ~rows] = 0
        W[:, lost_columns | ~columns] = 0


def damp_and_invert(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The damped matrix, and its inverse by Cholesky in float64."""
    damped = matrix + DAMPING * matrix.diagonal().mean() * torch.eye(len(matrix))
    return damped, torch.cholesky_inverse(torch.linalg.cholesky(damped.double())).float()


def structure_costs(W: Tensor, G: Tensor, A: Tensor, damped: Damped | None, kind: str) -> tuple[Tensor, Tensor]:
    """What each row and each column costs; without `damped` those of OBD."""
    if kind == "identity":
        return W.norm(dim=1), W.norm(dim=0)
    if kind == "activations":
        elements = W**2 / 2 / damped.Q.diagonal() if damped else W**2 / 2 * A.diagonal()
        return elements.sum(1), elements.sum(0)
    rows, columns = ((W @ A) * W).sum(1) / 2, ((G @ W) * W).sum(0) / 2
    if damped:
        return rows / damped.P.diagonal(), columns / damped.Q.diagonal()
    return rows * G.diagonal(), columns * A.diagonal()


def threshold(costs: Mapping[str, tuple[Tensor, Tensor]], sparsity: float) -> Tensor:
    """The largest cost up to which rows and columns can go with no more than `sparsity` of all weights."""
    everything, owner, removed = [], [], []
    for index, (rows, columns) in enumerate(costs.values()):
        R, C = len(rows), len(columns)
        cost, order = torch.cat([rows, columns]).sort()
        n_r, n_c = (order < R).cumsum(0), (order >= R).cumsum(0)
        everything.append(cost)
        owner.append(torch.full_like(order, index))
        removed.append(n_r * C + n_c * R - n_r * n_c)
    cost, order = torch.cat(everything).sort()
    table = torch.zeros(len(costs), len(cost), dtype=torch.int64)
    table[torch.cat(owner)[order], torch.arange(len(cost))] = torch.cat(removed)[order]
    total = sum(len(rows) * len(columns) for rows, columns in costs.values())
    fits = table.cummax(1).values.sum(0) <= int(sparsity * total)
    tau: Tensor = cost[fits.nonzero().max()]
    return tau


def update(W: Tensor, damped: Damped, rows: Tensor, columns: Tensor) -> Tensor:
    """Change of W [R, C]: that for the loss of `rows`, and that for the loss of `columns`, added up."""
    s1, K1 = torch.linalg.eigh(damped.G)
    s2, K2 = torch.linalg.eigh(damped.A)

    def step(multipliers: Tensor) -> Tensor:
        found: Tensor = K1 @ ((K1.t() @ multipliers @ K2) / torch.outer(s1, s2)) @ K2.t()
        return -found.nan_to_num()

    change = torch.zeros_like(W)
    if rows.any():
        multipliers = torch.zeros_like(W)
        multipliers[rows] = torch.linalg.solve(damped.P[rows][:, rows], W[rows]) @ damped.A
        by_rows = step(multipliers)
        by_rows[rows] = -W[rows]
        change += by_rows
    if columns.any():
        multipliers = torch.zeros_like(W)
        multipliers[:, columns] = damped.G @ torch.linalg.solve(damped.Q[columns][:, columns], W[:, columns].t()).t()
        by_columns = step(multipliers)
        by_columns[:, columns] = -W[:, columns]
        change += by_columns
    return change
