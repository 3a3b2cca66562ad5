"""The weights that stay, refitted to what the whole layer gives: each output row is a least-squares problem of its own.

With H = X^T X / tokens + lambda I scaled to a unit diagonal, G = S^-1 H S^-1, and Z = W S, that is
min ||(Z - D) G^(1/2)||^2 over D on the mask: conjugate gradients with the diagonal of H as their preconditioner, all
rows at once (Meng et al. 2024, arXiv 2406.07831, section 3.3).
"""

import torch
from torch import Tensor

ENOUGH = 1e-10  # a row whose residual has fallen so far makes no more steps: they would be rounding only


def refit(
    target: Tensor, unit: Tensor, keep: Tensor, found: Tensor, steps: int, fast: bool = False
) -> tuple[Tensor, float]:
    """Moves D towards the optimum on its mask.

    Args:
        target: Z float32 [out, in].
        unit: G float32 [in, in].
        keep: mask bool [out, in].
        found: D float32 [out, in] to begin with, zero off the mask.
        steps: of conjugate gradients.
        fast: whether directions are multiplied in bfloat16. Their rounding is no larger than that of weights which are
            stored so, and the first residual stays exact.

    Returns:
        D float32 [out, in], zero off the mask, and by how much ||(Z - D) G^(1/2)||^2 has fallen.
    """
    kind = torch.bfloat16 if fast else torch.float32
    curvature, on = unit.to(kind), keep.to(kind)
    residual = ((target - found) @ unit) * keep
    direction = residual.clone()
    length = torch.linalg.vecdot(residual, residual)[:, None]
    enough, fallen = ENOUGH * length, 0.0
    for _ in range(steps):
        curved = (direction.to(kind) @ curvature).mul_(on).float()
        bend = torch.linalg.vecdot(direction, curved)[:, None]
        step = torch.where((length > enough) & (bend > 0), length / bend, 0.0)
        fallen += (step * length).sum().item()
        found = torch.addcmul(found, step, direction)
        residual.addcmul_(step, curved, value=-1)
        shorter = torch.linalg.vecdot(residual, residual)[:, None]
        direction.mul_(shorter / length.clamp(min=1e-30)).add_(residual)
        length = shorter
    return found, fallen
