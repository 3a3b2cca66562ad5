"""What is removed becomes zero, and what stays moves to where the loss is lowest without it.

The new weight minimises tr(dW^T G dW A) / 2 under what is removed (arXiv 2312.17244, section 3.3), with dW = W - W_0.
In terms of the damped inverses P of G [R, R] and Q of A [c, c], for removed positions q = (r, c):

    rows       dW = -P[:, r] (P_rr)^-1 W[r, :]      A cancels
    columns    dW = -W[:, c] (Q_cc)^-1 Q[c, :]      G cancels
    elements   dW = -P X Q, X = x at the q and zero elsewhere, B x = w, B_qq' = P_rr' Q_cc'

B is too large to be made for all positions of a layer, and so the paper solves for 2000 of them at a time. But B x is
two products with P and Q, and that is all that conjugate gradients ask for: in a scale in which P and Q have unit
diagonals some fifty steps solve for all positions together, in less time than the many small systems would take.

All functions take W' [R, c] and give a new one of the same type in which what is removed is exactly zero. Nothing moves
to make up for what is dead (zero in P or Q).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from compression.core.errors import Problem

STEPS = 1000  # of conjugate gradients at most


def remove_rows(weight: Tensor, P: Tensor, rows: Tensor) -> Tensor:
    """W' without the rows [R] that are True: those that stay make up for all of them together.

    Raises:
        Problem: P is too close to singular.
    """
    P = P.to(weight)
    removed = rows & (P.diagonal() != 0)
    changed = weight - P[:, removed] @ _solve(P[removed][:, removed], weight[removed])
    return changed.masked_fill_(rows[:, None], 0)


def remove_columns(weight: Tensor, Q: Tensor, columns: Tensor) -> Tensor:
    """W' without the columns [c] that are True."""
    return remove_rows(weight.T, Q, columns).T.contiguous()


def remove_rows_and_columns(weight: Tensor, P: Tensor, Q: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """W' without rows [R] and columns [c]: one after the other, and yet the joint optimum.

    After the rows have gone, the slope G dW A is zero in every row that stays, and what the columns' update adds to it
    is zero in every column that stays. So the slope is zero wherever a weight is free, which is what makes a minimum;
    and rows that have gone stay zero, as the columns' update only mixes entries of the same row.
    """
    return remove_columns(remove_rows(weight, P, rows), Q, columns)


def remove_elements(
    weight: Tensor, P: Tensor, Q: Tensor, keep: Tensor, correlate: int, tolerance: float = 1e-3
) -> Tensor:
    """W' without single weights, solved for together or in groups of neighbouring rows.

    Groups take turns, each from the weight as those before have left it, and move again what was brought to zero. As
    that becomes zero in the end, some of what was won is lost: only without groups is it the optimum.

    Args:
        keep: bool [R, C] or [R, c], False where the weight goes; a bias that is not in it stays. What had gone before
            is to be among them: it has to stay zero.
        correlate: how many positions a group may have, if it has more rows than one; 0: all positions are one group.
        tolerance: what may be left of the weights before they are zeroed, as a share of their norm in units of what
            each would cost by itself.

    Raises:
        Problem: P and Q are too close to singular.
    """
    P, Q = P.to(weight), Q.to(weight)
    dropped, solved = _positions(weight, P, Q, keep)
    row_scale, column_scale = _scale(P), _scale(Q)
    P, Q = P / row_scale / row_scale[:, None], Q / column_scale / column_scale[:, None]
    scale = row_scale[:, None] * column_scale
    dense, moved = weight / scale, torch.zeros_like(weight)
    for own in _groups(solved.sum(1).tolist(), correlate):
        right = (dense[own] - moved[own]) * solved[own]
        moved += P[:, own] @ (_conjugate_gradients(P[own, own], Q, right, solved[own], tolerance) @ Q)
    return (weight - moved * scale).masked_fill_(dropped, 0)


def remove_lines_independently(weight: Tensor, P: Tensor, Q: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """As `remove_rows_and_columns`, but the sum of what each row and column would ask for if it went by itself."""
    changed = weight - _each_row(weight, P, rows) - _each_row(weight.T, Q, columns).T
    return changed.masked_fill_(rows[:, None] | columns, 0)


def remove_elements_independently(weight: Tensor, P: Tensor, Q: Tensor, keep: Tensor) -> Tensor:
    """As `remove_elements`, but the sum of what each weight would ask for if it went by itself."""
    P, Q = P.to(weight), Q.to(weight)
    dropped, solved = _positions(weight, P, Q, keep)
    pull = torch.where(solved, weight / P.diagonal()[:, None] / Q.diagonal(), 0.0)
    return (weight - P @ (pull @ Q)).masked_fill_(dropped, 0)


def _each_row(weight: Tensor, P: Tensor, rows: Tensor) -> Tensor:
    P = P.to(weight)
    removed = rows & (P.diagonal() != 0)
    return P[:, removed] @ (weight[removed] / P.diagonal()[removed, None])


def _positions(weight: Tensor, P: Tensor, Q: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """bool [R, c], twice: what is dropped, and what of it is alive."""
    dropped = torch.zeros_like(weight, dtype=torch.bool)
    dropped[:, : keep.shape[1]] = ~keep
    return dropped, dropped & (P.diagonal() != 0)[:, None] & (Q.diagonal() != 0)


def _scale(matrix: Tensor) -> Tensor:
    """What rows and columns are to be divided by for a unit diagonal; 1 for what is dead."""
    diagonal = matrix.diagonal()
    return torch.where(diagonal == 0, 1.0, diagonal.sqrt())


def _groups(counts: list[int], most: int) -> Iterator[slice]:
    """Neighbouring rows with at most `most` positions in all, a row that has more by itself; all rows for 0."""
    start = held = 0
    for row, count in enumerate(counts):
        if most and held and held + count > most:
            yield slice(start, row)
            start, held = row, 0
        held += count
    yield slice(start, len(counts))


def _conjugate_gradients(P: Tensor, Q: Tensor, right: Tensor, where: Tensor, tolerance: float) -> Tensor:
    """X [m, c], zero but `where`, with P X Q = right there (Hestenes and Stiefel 1952). P [m, m], Q [c, c]."""
    found, residual, direction = torch.zeros_like(right), right.clone(), right.clone()
    square = right.square().sum().item()
    enough = tolerance**2 * square
    for _ in range(STEPS):
        if square <= enough:
            return found
        image = (P @ direction @ Q).mul_(where)
        curvature = (direction * image).sum().item()
        if not curvature > 0:
            break
        step = square / curvature
        found.add_(direction, alpha=step)
        residual.sub_(image, alpha=step)
        last, square = square, residual.square().sum().item()
        direction.mul_(square / last).add_(residual)
    raise Problem("curvature", "the update of what stays cannot be found to any precision", "raise the damping")


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """x of matrix x = right, by Cholesky in float64."""
    lower, fault = torch.linalg.cholesky_ex(matrix.double())
    if fault:
        raise Problem("curvature", "an inverse is not positive after rounding", "raise the damping")
    return torch.cholesky_solve(right.double(), lower).to(right.dtype)
