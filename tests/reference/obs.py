"""Optimal brain surgery the slow way, in float64: a fresh inverse or a fresh least-squares problem at each column."""

from typing import Literal

import torch
from torch import Tensor

from compression.pruning.pattern import NofM, Pattern
from tests.reference.pruning import keep_highest, spread

Score = Literal["cost", "magnitude", "wanda"]


def hessian(inputs: Tensor, damping: float) -> Tensor:
    """H = X^T X / tokens + lambda I of inputs [tokens, in]; a dead input has a one on the diagonal before lambda."""
    tokens, width = inputs.shape
    H = torch.zeros(width, width, dtype=torch.float64)
    for token in inputs.double():
        H += torch.outer(token, token) / tokens
    for column in range(width):
        if H[column, column] == 0:
            H[column, column] = 1
    return H + damping * H.diagonal().mean() * torch.eye(width, dtype=torch.float64)


def surgery(row: Tensor, H: Tensor, keep: Tensor) -> Tensor:
    """One row [in] under its mask. No OBS formula: at each column the rest is solved for, given all before it.

    (w - w_0)^T H (w - w_0) is minimised over the columns from `column` on, those before being as they were decided.
    """
    dense, found = row.double(), row.double().clone()
    for column in range(len(dense)):
        done = (found - dense)[:column]
        found[column:] = dense[column:] - torch.linalg.solve(H[column:, column:], H[column:, :column] @ done)
        if not keep[column]:
            found[column] = 0
    return found


def sweep(
    weight: Tensor,
    inputs: Tensor,
    pattern: Pattern,
    score: Score = "cost",
    keep: Tensor | None = None,
    damping: float = 0.01,
    columns: int = 128,
    bits: int | None = None,
    group_size: int = 64,
    ties_as: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """SparseGPT and its kin: weights float64 [out, in] and the mask; the inverse of what is left anew at each column.

    Args:
        keep: the mask, if it is not to be chosen in blocks of columns (groups of N:M) as their turn comes.
        ties_as: rounded weights [out, in] to follow where a weight lies halfway between two values of the grid.
            The lowest weight of a group does so whenever it is also the largest: the grid ends half a step above.
    """
    rows, width = weight.shape
    H = hessian(inputs, damping)
    norms = inputs.double().square().sum(0).sqrt()
    inverses = [torch.linalg.inv(H[column:, column:]) for column in range(width)]
    values = weight.double().clone()
    values[:, norms == 0] = 0
    chosen = torch.ones(rows, width, dtype=torch.bool) if keep is None else keep.clone()
    group = pattern.of if isinstance(pattern, NofM) else columns
    scale = torch.ones(rows)

    for column in range(width):
        if keep is None and column % group == 0:
            last = min(column + group, width)
            importance = {
                "cost": values**2 / torch.stack([inverse[0, 0] for inverse in inverses]),
                "magnitude": values.abs(),
                "wanda": values.abs() * norms,
            }[score][:, column:last]
            if isinstance(pattern, NofM):
                chosen[:, column:last] = keep_highest(importance, pattern)
            else:
                total = round(pattern.sparsity * rows * width)
                chosen[:, column:last] = keep_lowest_out(
                    importance, total * last // width - total * column // width, pattern.scope == "row"
                )
        if bits and column % group_size == 0:
            part = slice(column, column + group_size)
            largest = (values[:, part] * chosen[:, part]).abs().amax(1)
            scale = (largest / (2 ** (bits - 1) - 0.5)).to(weight.dtype)
            scale[scale == 0] = 1
        new = values[:, column] * chosen[:, column]
        if bits:
            codes = (new / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            new, exact = (codes.to(weight.dtype) * scale).double(), values[:, column]
            if ties_as is not None:
                other = ties_as[:, column].double()
                tied = (other - exact).abs() <= (new - exact).abs() + 1e-3 * scale
                new = torch.where(tied & chosen[:, column], other, new)
        lost = values[:, column] - new
        values[:, column:] -= lost[:, None] * inverses[column][0] / inverses[column][0, 0]
        values[:, column] = new
    return values, chosen


def keep_lowest_out(score: Tensor, count: int, by_row: bool) -> Tensor:
    """Mask bool like `score` without its `count` lowest entries, the same number from each row or from all."""
    keep = torch.ones(score.shape, dtype=torch.bool)
    table, (rows, width) = score.tolist(), score.shape
    if by_row:
        for row, share in enumerate(spread(count, rows)):
            keep[row, sorted(range(width), key=lambda column: (table[row][column], column))[:share]] = False
        return keep
    places = sorted((table[row][column], row, column) for row in range(rows) for column in range(width))
    for _, row, column in places[:count]:
        keep[row, column] = False
    return keep


def refit(weight: Tensor, H: Tensor, keep: Tensor) -> Tensor:
    """Each row's optimum on its own support, float64: H_SS w_S = H_S w_0."""
    found = torch.zeros(weight.shape, dtype=torch.float64)
    for row, (dense, kept) in enumerate(zip(weight.double(), keep, strict=True)):
        if kept.any():
            found[row, kept] = torch.linalg.solve(H[kept][:, kept], H[kept] @ dense)
    return found


def objective(weight: Tensor, changed: Tensor, H: Tensor) -> float:
    """The sum over rows of (w - w_0)^T H (w - w_0)."""
    return sum(float(lost @ H @ lost) for lost in changed.double() - weight.double())


def layer_error(weight: Tensor, changed: Tensor, inputs: Tensor) -> float:
    """||X (W - W')^T||^2 / ||X W^T||^2, by running the tokens through both layers."""
    X = inputs.double()
    whole, other = X @ weight.double().T, X @ changed.double().T
    return float((whole - other).square().sum() / whole.square().sum())


def alps(weight: Tensor, inputs: Tensor, pattern: Pattern, damping: float = 0.01) -> tuple[Tensor, Tensor]:
    """ALPS: ADMM with an explicit inverse a step (arXiv 2406.07831, algorithm 1), then the exact refit."""
    H = hessian(inputs, damping)
    scale = H.diagonal().sqrt()
    G, Z = H / scale / scale[:, None], weight.double() * scale
    one = torch.eye(len(H), dtype=torch.float64)
    keep = keep_highest(Z.abs(), pattern)
    D, V, rho, kept = Z * keep, torch.zeros_like(Z), 0.1, int(keep.sum())
    history = [keep]
    while True:
        P = (Z @ G - V + rho * D) @ torch.linalg.inv(G + rho * one)
        keep = keep_highest((P + V / rho).abs(), pattern)
        D = (P + V / rho) * keep
        V = V + rho * (P - D)
        history.append(keep)
        if (len(history) - 1) % 3 == 0:
            moved = int((history[-1] & ~history[-4]).sum())
            if moved == 0:
                return refit(weight, H, keep), keep
            rho *= 1.3 if moved >= 0.1 * kept else 1.2 if moved >= 0.005 * kept else 1.1
