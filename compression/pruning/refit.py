"""The weights that stay, refitted to what the whole layer gives: each output row is a least-squares problem of its own.

With H = X^T X / tokens + lambda I scaled to a unit diagonal, G = S^-1 H S^-1, and Z = W S, that is
min ||(Z - D) G^(1/2)||^2 over D on the mask: conjugate gradients with the diagonal of H as their preconditioner, all
rows at once (Meng et al. 2024, arXiv 2406.07831, section 3.3).
"""

import torch
from torch import Tensor

ENOUGH = 1e-10  # a row whose residual has fallen so far makes no more steps: they would be rounding only


def refit(target: Tensor, unit: Tensor, keep: Tensor, found: Tensor, steps: int) -> Tensor:
    """Moves D towards the optimum on its mask; no step makes a row's error larger.

    Args:
        target: Z float32 [out, in].
        unit: G float32 [in, in].
        keep: mask bool [out, in].
        found: D float32 [out, in] to begin with, zero off the mask.
        steps: of conjugate gradients.

    Returns:
        D float32 [out, in], zero off the mask.
    """
    residual = ((target - found) @ unit) * keep
    direction = residual.clone()
    length = residual.square().sum(1, keepdim=True)
    enough = ENOUGH * length
    for _ in range(steps):
        curved = (direction @ unit) * keep
        bend = (direction * curved).sum(1, keepdim=True)
        step = torch.where((length > enough) & (bend > 0), length / bend, 0.0)
        found = found + step * direction
        residual -= step * curved
        shorter = residual.square().sum(1, keepdim=True)
        direction = residual + shorter / length.clamp(min=1e-30) * direction
        length = shorter
    return found
