"""ALPS: the layer's own problem solved by ADMM, then the kept weights refitted by conjugate gradients.

Meng et al. 2024, arXiv 2406.07831. With H = X^T X / tokens + lambda I scaled to a unit diagonal, G = S^-1 H S^-1 and
Z = W S, the problem is min ||(Z - D) G^(1/2)||^2 over sparse D. ADMM splits it into P (no constraint) and D (sparse):

    P <- (Z G - V + rho D) (G + rho I)^-1      D <- the highest |P + V / rho|      V <- V + rho (P - D)

rho grows the faster, the more the support of D still changes; once it stands, each row's weights on it are refitted.
"""

import torch
from torch import Tensor

from compression.pruning.method import Pruned, Settings
from compression.pruning.pattern import Pattern
from compression.pruning.select import keep_highest
from compression.statistics import Gram

STATISTIC = Gram
SCOPES = ("layer", "row")

EVERY = 3  # ADMM steps between two looks at the support
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))  # share of the support that changed -> factor of rho
REFIT = 20  # steps of conjugate gradients


def prune(weight: Tensor, statistic: Gram, pattern: Pattern, settings: Settings) -> Pruned:
    """Finds a mask and the weights under it together.

    Args:
        weight: W [out, in], any floating type.
        statistic: X^T X over the calibration tokens.
        pattern: what the mask has to satisfy.
        settings: damping; iterations, after which ADMM stops even if the support has not settled.

    Returns:
        the layer, with notes: `steps` of ADMM, and `error`, the share ||X (W - W')||^2 / ||X W||^2.
    """
    scale, scaled, values, vectors = statistic.scaled(settings.damping)
    target = weight.float() * scale
    target[:, statistic.norms() == 0] = 0  # dead inputs
    keep, steps = _support(target, scaled, values, vectors, pattern, settings.iterations)
    refitted = _refit(target, scaled, keep)
    pruned = (refitted / scale).to(weight.dtype) * keep
    return Pruned(pruned, keep, {"steps": float(steps), "error": statistic.error(weight, pruned)})


def _support(
    target: Tensor, scaled: Tensor, values: Tensor, vectors: Tensor, pattern: Pattern, iterations: int
) -> tuple[Tensor, int]:
    """ADMM: Z [out, in], G [in, in] and its eigenvalues and -vectors -> mask bool [out, in], steps taken."""
    pull = target @ scaled
    sparse = target * keep_highest(target.abs(), pattern)
    dual = torch.zeros_like(target)
    rho, seen = 0.1, sparse != 0
    kept = max(1, int(seen.sum()))
    for step in range(1, iterations + 1):
        free = ((pull - dual + rho * sparse) @ vectors).div_(values + rho) @ vectors.T
        wanted = free + dual / rho
        keep = keep_highest(wanted.abs(), pattern)
        sparse = wanted * keep
        dual += rho * (free - sparse)
        if step % EVERY == 0:
            changed = int((keep ^ seen).count_nonzero()) / 2 / kept
            if changed == 0:
                break
            rho *= next(factor for share, factor in GROWTH if changed >= share)
            seen = keep
    return keep_highest(wanted.abs(), pattern), step


def _refit(target: Tensor, scaled: Tensor, keep: Tensor) -> Tensor:
    """min ||(Z - D) G^(1/2)||^2 over D [out, in] on the mask, each row by conjugate gradients of its own."""
    found = target * keep
    residual = ((target - found) @ scaled) * keep
    direction = residual.clone()
    length = residual.square().sum(1, keepdim=True)
    enough = 1e-10 * length  # a row that is there makes no more steps: they would be rounding only
    for _ in range(REFIT):
        curved = (direction @ scaled) * keep
        bend = (direction * curved).sum(1, keepdim=True)
        step = torch.where((length > enough) & (bend > 0), length / bend, 0.0)
        found += step * direction
        residual -= step * curved
        shorter = residual.square().sum(1, keepdim=True)
        direction = residual + shorter / length.clamp(min=1e-30) * direction
        length = shorter
    return found
