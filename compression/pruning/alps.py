"""ALPS: the layer's own problem solved by ADMM, then the kept weights refitted by conjugate gradients.

Meng et al. 2024, arXiv 2406.07831. With H = X^T X / tokens + lambda I scaled to a unit diagonal, G = S^-1 H S^-1 and
Z = W S, the problem is min ||(Z - D) G^(1/2)||^2 over sparse D. ADMM splits it into P (no constraint) and D (sparse):

    P <- (Z G - V + rho D) (G + rho I)^-1      D <- the highest |P + V / rho|      V <- V + rho (P - D)

rho grows the faster, the more the support of D still changes; once it stands, each row's weights on it are refitted
(compression.pruning.refit).
"""

import torch
from torch import Tensor

from compression.pruning.method import Pruned, Settings
from compression.pruning.pattern import Pattern
from compression.pruning.refit import refit
from compression.pruning.select import keep_highest
from compression.statistics import Gram

STATISTIC = Gram
SCOPES = ("layer", "row")

EVERY = 3  # ADMM steps between two looks at the support
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))  # share of the support that changed -> factor of rho


def prune(weight: Tensor, statistic: Gram, pattern: Pattern, settings: Settings) -> Pruned:
    """Finds a mask and the weights under it together.

    Args:
        weight: W [out, in], any floating type.
        statistic: X^T X over the calibration tokens.
        pattern: what the mask has to satisfy.
        settings: damping; iterations, after which ADMM stops even if the support has not settled; refit.

    Returns:
        the layer, with notes: `steps` of ADMM, and `error`, the share ||X (W - W')||^2 / ||X W||^2.
    """
    scale, unit = statistic.unit(settings.damping)
    target = weight.float() * scale
    target[:, statistic.norms() == 0] = 0  # dead inputs
    keep, sparse, steps = _support(target, unit, *statistic.eigen(settings.damping), pattern, settings.iterations)
    refitted, _ = refit(target, unit, keep, sparse, settings.refit)
    pruned = (refitted / scale).to(weight.dtype) * keep
    return Pruned(pruned, keep, {"steps": float(steps), "error": statistic.error(weight, pruned)})


def _support(
    target: Tensor, unit: Tensor, values: Tensor, vectors: Tensor, pattern: Pattern, iterations: int
) -> tuple[Tensor, Tensor, int]:
    """ADMM: Z [out, in], G [in, in], its eigenvalues and -vectors -> mask bool [out, in], D [out, in], steps taken."""
    pull = target @ unit
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
    return keep, sparse, step
