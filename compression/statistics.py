"""What a layer's input looks like: statistics that are summed up batch by batch."""

from typing import NamedTuple

import torch
from torch import Tensor

from compression.core.errors import Problem

ENTRIES = 2**17  # of `InputNorms` at a time: their float32 copy stays in the processor's cache
CHUNK = 1024  # tokens a product of `Gram`
PANEL = 256  # columns of the strips in which the upper half of a product is computed
LEAF = 128  # columns of H that are factored at once


class InputNorms:
    """Squared norm of every input feature over all tokens seen.

    Attributes:
        squares: float64 [in], sum over tokens of x_j^2. Products are exact in float32 for bfloat16 input,
            partial sums run over ENTRIES / in tokens, and the total is kept in float64, so the way in which tokens
            are split into batches moves it by rounding only.
        tokens: how many tokens were seen.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.squares = torch.zeros(width, dtype=torch.float64, device=device)
        self.tokens = 0

    def update(self, inputs: Tensor) -> None:
        """Adds inputs [..., in]."""
        flat = inputs.reshape(-1, inputs.shape[-1])
        for rows in flat.split(max(1, ENTRIES // flat.shape[1])):
            copy = rows.to(torch.float32, copy=True)
            self.squares += copy.mul_(copy).sum(0).double()
        self.tokens += len(flat)

    def norms(self) -> Tensor:
        """float32 [in]: the l2 norm over the tokens, ||X_j||_2."""
        return self.squares.sqrt().float()


class Factor(NamedTuple):
    """H = X^T X / tokens + lambda I, ready for OBS.

    Attributes:
        upper: U float32 [in, in], upper triangular, H^-1 = U^T U.
        dead: bool [in], inputs that were zero on every token; H has a one on their diagonal.
        damping: lambda, as a share of the mean of the diagonal, with which H could be factored.
        order: int64 [in], which input stands where in `upper` and `dead`.
    """

    upper: Tensor
    dead: Tensor
    damping: float
    order: Tensor


class Unit(NamedTuple):
    """H = X^T X / tokens + lambda I with a unit diagonal, G = S^-1 H S^-1: S float32 [in], G float32 [in, in]."""

    scale: Tensor
    matrix: Tensor


class Gram:
    """X^T X over all tokens seen.

    Tokens are added CHUNK at a time, wherever batches begin and end, so the split into batches does not move one
    bit. bfloat16 inputs are multiplied as they are, at the speed of the matrix unit, with sums in float32 inside a
    product; each product comes out rounded to bfloat16, and these roundings average out over the chunks, which are
    added in float32. Only the upper half is computed.

    Attributes:
        tokens: how many tokens were seen.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.tokens = 0
        self._sum = torch.zeros(width, width, device=device)
        self._held: list[Tensor] = []
        self._whole: Tensor | None = None
        self._factors: dict[tuple[float, bool], Factor] = {}  # layers that share an input share what is made of it
        self._units: dict[float, Unit] = {}
        self._eigen: dict[float, tuple[Tensor, Tensor]] = {}

    def update(self, inputs: Tensor) -> None:
        """Adds inputs [..., in]."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        self.tokens += len(rows)
        self._whole = None
        while len(rows):
            room = CHUNK - sum(len(part) for part in self._held)
            part, rows = rows[:room], rows[room:]
            if len(part) == CHUNK:
                self._add(part)
                continue
            self._held.append(part.clone())
            if len(part) == room:
                self._flush()

    def matrix(self) -> Tensor:
        """float32 [in, in]: X^T X / tokens, symmetric. Made once; not to be changed."""
        if self._whole is None:
            self._flush()
            self._whole = self._sum / self.tokens
            for start, end in self._panels():
                corner = self._whole[start:end, start:end]
                corner.copy_(corner.triu() + corner.triu(1).T)
                self._whole[end:, start:end] = self._whole[start:end, end:].T
        return self._whole

    def norms(self) -> Tensor:
        """float32 [in]: the l2 norm over the tokens, ||X_j||_2."""
        self._flush()
        return self._sum.diagonal().clamp(min=0).sqrt()

    def error(self, weight: Tensor, changed: Tensor) -> float:
        """||X (W - W')^T||^2 / ||X W^T||^2 of weights [out, in]: how much of a layer's output has gone wrong."""
        total = self.energy(weight)
        return self.energy(weight.float() - changed.float()) / total if total > 0 else 0.0

    def energy(self, weight: Tensor) -> float:
        """||X W^T||^2 / tokens of weights [out, in]: the mean square of a layer's output, summed over its rows."""
        whole = weight.float()
        return ((whole @ self.matrix()) * whole).sum().item()

    def factor(self, damping: float, loudest_first: bool = False) -> Factor:
        """H factored, made once. Damping is raised tenfold until it can be.

        Args:
            loudest_first: inputs in the order of falling norms, not in their own.

        Raises:
            Problem: it cannot even with a damping of 1.
        """
        if (damping, loudest_first) not in self._factors:
            self._factors[damping, loudest_first] = self._factor(damping, loudest_first)
        return self._factors[damping, loudest_first]

    def unit(self, damping: float) -> Unit:
        """H with a unit diagonal, made once; a dead input has a one on H's diagonal."""
        if damping not in self._units:
            matrix, _ = self._alive()
            matrix.diagonal().add_(damping * matrix.diagonal().mean())
            scale = matrix.diagonal().sqrt()
            self._units[damping] = Unit(scale, matrix / scale / scale[:, None])
        return self._units[damping]

    def eigen(self, damping: float) -> tuple[Tensor, Tensor]:
        """Eigenvalues [in] and -vectors [in, in] of `unit`, made once."""
        if damping not in self._eigen:
            values, vectors = torch.linalg.eigh(self.unit(damping).matrix)
            self._eigen[damping] = values.clamp(min=0), vectors
        return self._eigen[damping]

    def _factor(self, damping: float, loudest_first: bool) -> Factor:
        matrix, dead = self._alive()
        order = torch.arange(len(matrix), device=matrix.device)
        if loudest_first:
            order = matrix.diagonal().sort(descending=True, stable=True).indices
            matrix, dead = matrix[order][:, order], dead[order]
        mean = matrix.diagonal().mean()
        while damping <= 1:
            damped = matrix.clone()
            damped.diagonal().add_(damping * mean)
            upper = _upper(damped)
            if upper is not None and upper.isfinite().all():
                return Factor(upper, dead, damping, order)
            damping = max(10 * damping, 1e-4)
        raise Problem("X^T X", "cannot be factored", "raise the damping, or look whether the inputs are sound")

    def _alive(self) -> tuple[Tensor, Tensor]:
        matrix = self.matrix().clone()
        dead = matrix.diagonal() == 0
        matrix.diagonal()[dead] = 1
        return matrix, dead

    def _flush(self) -> None:
        if self._held:
            self._add(torch.cat(self._held))
            self._held.clear()

    def _add(self, rows: Tensor) -> None:
        fast = rows.dtype == torch.bfloat16 and rows.device.type == "cpu"
        rows = rows if fast else rows.float()
        for start, end in self._panels():
            self._sum[start:end, start:] += rows[:, start:end].T @ rows[:, start:]

    def _panels(self) -> list[tuple[int, int]]:
        """Strips of columns; of each, what lies right of its first column is computed."""
        width = len(self._sum)
        number = -(-width // PANEL)
        step = -(-width // number)
        return [(start, min(start + step, width)) for start in range(0, width, step)]


def _upper(H: Tensor) -> Tensor | None:
    """U [n, n], upper triangular, H^-1 = U^T U; None where H is not positive definite.

    By halves, H = [A B; B^T C]: with R = U^-1, H = R R^T, so C = R_22 R_22^T, R_12 = B R_22^-T, and R_11 is the
    factor of what is then left of A. Nearly all operations are matrix products, and nothing is factored first and
    inverted after.
    """
    if len(H) <= LEAF:
        # With J turning rows and columns round and J H J = L L^T: U = J L^-1 J.
        lower, fault = torch.linalg.cholesky_ex(H.flip(0, 1))
        one = torch.eye(len(H), device=H.device)
        return None if fault else torch.linalg.solve_triangular(lower, one, upper=False).flip(0, 1)
    half = len(H) // 2
    if (tail := _upper(H[half:, half:])) is None:
        return None
    side = H[:half, half:] @ tail.T
    if (head := _upper(torch.addmm(H[:half, :half], side, side.T, alpha=-1))) is None:
        return None
    upper = torch.zeros_like(H)
    upper[:half, :half], upper[half:, half:] = head, tail
    upper[:half, half:] = -(head @ (side @ tail))
    return upper
