"""The two factors of a layer's curvature, and their inverses.

F = G (x) A, so that the loss rises by tr(dW^T G dW A) / 2; P = (G + damping * mean diag G * I)^-1 and Q likewise of A.
Where a factor is not known it is the identity: without G what is left is the error of the layer's output (L-OBD, and
SparseGPT's cost), without either magnitude. The released code brings A and G to one norm; as damping is a share of each
one's own diagonal, that would move no cost and no update, and is not done.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from compression.core.errors import Problem


@dataclass(frozen=True)
class Factors:
    """Symmetric, positive semidefinite.

    Attributes:
        inputs: A float32 [c, c], mean over tokens of a a^T with a the layer's input (a bias is an input that is
            always 1, the last one); None: the identity.
        outputs: G float32 [R, R], mean over tokens of g g^T with g the gradient of a sequence's summed loss in nats
            with respect to the layer's output; None: the identity.
    """

    inputs: Tensor | None
    outputs: Tensor | None


@dataclass(frozen=True)
class Inverses:
    """Of the damped factors.

    Attributes:
        inputs: Q [c, c], zero in rows and columns of dead inputs.
        outputs: P [R, R], likewise of dead outputs.
    """

    inputs: Tensor
    outputs: Tensor


def alive(weight: Tensor, factors: Factors, bias: bool) -> tuple[Tensor, Tensor]:
    """Which rows and columns anything hangs on.

    A row is dead if it is zero or no gradient ever comes back to it, a column if it is zero or its input always is.
    Removing what is dead costs nothing, and an update does not bring it to life.

    Args:
        weight: W' [R, c].
        factors: of the layer.
        bias: whether the last column is the layer's bias, which is alive even where it is zero.

    Returns:
        bool [R] and bool [c].
    """
    there = weight != 0
    rows, columns = there.any(1), there.any(0)
    if factors.outputs is not None:
        rows &= factors.outputs.diagonal().to(weight.device) != 0
    if bias:
        columns[-1] = True
    if factors.inputs is not None:
        columns &= factors.inputs.diagonal().to(weight.device) != 0
    return rows, columns


def invert(matrix: Tensor | None, size: int, alive: Tensor, damping: float) -> Tensor:
    """The inverse of a damped factor among what is alive, by Cholesky in float64. Damping is raised until it exists.

    Args:
        matrix: A or G [n, n]; None: the identity, which is its own inverse and not damped.
        size: n.
        alive: bool [n].
        damping: what is added to the diagonal, as a share of the mean of what is alive of it.

    Returns:
        [n, n] of the matrix's type (float32 of the identity), zero in rows and columns of what is dead.

    Raises:
        Problem: the matrix cannot be factored even with a damping of 1.
    """
    if matrix is None:
        return torch.diag(alive.float())
    places = alive.nonzero().flatten().to(matrix.device)
    inverse = torch.zeros_like(matrix)
    if len(places):
        living = matrix[places][:, places].double()
        inverse[places[:, None], places] = _damped_inverse(living, damping).to(matrix.dtype)
    return inverse


def _damped_inverse(matrix: Tensor, damping: float) -> Tensor:
    """float64 [n, n]; `matrix` is not to be used again."""
    diagonal = matrix.diagonal().clone()
    mean = diagonal.mean()
    while damping <= 1:
        matrix.diagonal().copy_(diagonal + damping * mean)
        lower, fault = torch.linalg.cholesky_ex(matrix)
        if not fault:
            inverse = torch.cholesky_inverse(lower)
            if inverse.isfinite().all():
                return inverse
        damping = max(10 * damping, 1e-4)
    raise Problem("curvature", "a factor cannot be inverted", "raise the damping, or look whether the model is sound")
