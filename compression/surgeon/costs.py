"""By how much the loss is predicted to rise when something of a layer is removed, in nats a token.

Two formulas each (arXiv 2312.17244, section 3). With an update, the optimal brain surgeon's (Hassibi and Stork 1993):
what stays makes up for the loss, so inverses P and Q divide. Without one, the optimal brain damage's (LeCun et al.
1989): diagonals of A and G multiply.

             with an update                 without
    element  W_rc^2 / (P_rr Q_cc) / 2       W_rc^2 G_rr A_cc / 2
    row      (W A W^T)_rr / P_rr / 2        (W A W^T)_rr G_rr / 2
    column   (W^T G W)_cc / Q_cc / 2        (W^T G W)_cc A_cc / 2

P and Q are damped, A and G are not. All functions take W' [R, c], in whose type they compute, the layer's factors,
their inverses (which are not looked at without an update), and whether there is to be an update. What is dead costs 0.
They raise Problem where a cost is no finite number: as 0 it would be the first to go.
"""

import torch
from torch import Tensor

from compression.core.errors import Problem
from compression.surgeon.factors import Factors, Inverses


def element_costs(weight: Tensor, factors: Factors, inverses: Inverses, update: bool) -> Tensor:
    """[R, c], of each weight by itself."""
    half = weight.square() / 2
    if update:
        P, Q = _diagonal(inverses.outputs, half, 0), _diagonal(inverses.inputs, half, 1)
        return _checked(_over(_over(half, P[:, None]), Q))
    G, A = _diagonal(factors.outputs, half, 0), _diagonal(factors.inputs, half, 1)
    return _checked(half * G[:, None] * A)


def row_costs(weight: Tensor, factors: Factors, inverses: Inverses, update: bool) -> Tensor:
    """[R], of each row with its bias."""
    half = (_times(weight, factors.inputs) * weight).sum(1) / 2  # (W A W^T)_rr / 2
    if update:
        return _checked(_over(half, _diagonal(inverses.outputs, weight, 0)))
    return _checked(half * _diagonal(factors.outputs, weight, 0))


def column_costs(weight: Tensor, factors: Factors, inverses: Inverses, update: bool) -> Tensor:
    """[c], of each column; the bias as any other."""
    half = (_times(weight.T, factors.outputs) * weight.T).sum(1) / 2  # (W^T G W)_cc / 2
    if update:
        return _checked(_over(half, _diagonal(inverses.inputs, weight, 1)))
    return _checked(half * _diagonal(factors.inputs, weight, 1))


def column_group_costs(weight: Tensor, factors: Factors, inverses: Inverses, groups: Tensor, update: bool) -> Tensor:
    """[n], of all columns E of a group together: tr((Q_EE)^-1 W_E^T G W_E) / 2, or tr(A_EE W_E^T G W_E) / 2.

    Args:
        groups: int64 [n, size], columns that go together, each at most once in a group.
    """
    columns = weight.T[groups]  # [n, size, R]
    energy = columns @ _times(weight.T, factors.outputs)[groups].mT  # W_E^T G W_E [n, size, size]
    if not update:
        if factors.inputs is None:
            return _checked(energy.diagonal(dim1=1, dim2=2).sum(1) / 2)
        return _checked((_corners(factors.inputs, groups).to(weight) * energy).sum((1, 2)) / 2)
    corners = _corners(inverses.inputs, groups).to(weight.device, torch.float64)
    dead = corners.diagonal(dim1=1, dim2=2) == 0
    energy = energy.double().masked_fill(dead[:, :, None], 0)
    # By Cholesky: torch 2.13's LU of a batch on a CPU gives wrong pivots with more than one thread.
    lower, faults = torch.linalg.cholesky_ex(corners + torch.diag_embed(dead.double()))
    if faults.any():
        raise Problem("curvature", "an inverse is not positive after rounding", "raise the damping")
    solved = torch.cholesky_solve(energy, lower)
    return _checked((solved.diagonal(dim1=1, dim2=2).sum(1) / 2).to(weight.dtype))


def group_costs_nofm(elements: Tensor, keep: int, of: int) -> Tensor:
    """[R, C / of], what each group of `of` neighbouring inputs costs if its of - keep cheapest weights go.

    Args:
        elements: [R, C], costs of weights, without the bias; `of` divides C.
    """
    groups = elements.reshape(len(elements), -1, of)
    return groups.sort(dim=2).values[..., : of - keep].sum(2)


def _times(weight: Tensor, matrix: Tensor | None) -> Tensor:
    return weight if matrix is None else weight @ matrix.to(weight)


def _diagonal(matrix: Tensor | None, weight: Tensor, dim: int) -> Tensor:
    """Of a matrix on one side of `weight`."""
    return weight.new_ones(weight.shape[dim]) if matrix is None else matrix.diagonal().to(weight)


def _corners(matrix: Tensor, groups: Tensor) -> Tensor:
    """[n, size, size]: the rows and columns of each group."""
    return matrix[groups[:, :, None], groups[:, None, :]]


def _over(costs: Tensor, diagonal: Tensor) -> Tensor:
    """costs / diagonal; 0 for what is dead, whose inverse is zero."""
    return torch.where(diagonal == 0, 0.0, costs / diagonal)


def _checked(costs: Tensor) -> Tensor:
    if not costs.isfinite().all():
        raise Problem("curvature", "a cost is not a finite number", "look whether weights and calibration are sound")
    return costs.clamp(min=0)  # what rounding puts below
