"""Cross entropy over a large vocabulary: logits are the largest tensor of a training step, so few copies are made."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

ROWS = 128  # tokens whose float32 logits are alive at a time


def mixed_cross_entropy(logits: Tensor, ids: Tensor, teacher: Tensor | None = None, share: float = 0.0) -> Tensor:
    """Mean over tokens of (1 - share) * -log p(next token) + share * KL(q || p), with q the teacher's distribution.

    Sums are in float32 whatever the type of the logits. The gradient is (p - (1 - share) e_next - share q) / tokens.

    Args:
        logits: [N, T, V]; those of the last token of each sequence predict nothing and are not looked at.
        ids: int64 [N, T].
        teacher: logits [N, T, V] that take no gradient.
        share: of the distillation, in [0, 1]; 0 without a teacher.

    Returns:
        a float32 scalar, in nats a token.
    """
    loss: Tensor = _MixedCrossEntropy.apply(logits, ids, teacher, share)
    return loss


class _MixedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, teacher: Tensor | None, share: float) -> Tensor:
        total = torch.zeros((), device=logits.device, dtype=torch.float64)
        for p, following, q in _parts(logits, ids, teacher):
            log_p = p.float().log_softmax(1)
            total += (1 - share) * F.nll_loss(log_p, following, reduction="sum")
            if q is not None:
                total += share * F.kl_div(log_p, q.float().log_softmax(1), reduction="sum", log_target=True)
        ctx.save_for_backward(logits, ids, teacher)
        ctx.share = share
        return (total / _predicted(ids)).float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        logits, ids, teacher = ctx.saved_tensors
        scale = grad.float() / _predicted(ids)
        pull = torch.empty_like(logits)
        pull[:, -1] = 0
        into = _parts(pull, ids, None)
        for (p, following, q), (out, _, _) in zip(_parts(logits, ids, teacher), into, strict=True):
            slope = p.float().softmax(1)
            slope[torch.arange(len(slope), device=slope.device), following] -= 1 - ctx.share
            if q is not None:
                slope -= q.float().softmax(1).mul_(ctx.share)
            out.copy_(slope.mul_(scale))
        return pull, None, None, None


def _parts(logits: Tensor, ids: Tensor, teacher: Tensor | None) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """Views of at most ROWS tokens: logits [n, V], the tokens that follow [n], the teacher's logits."""
    last = ids.shape[1] - 1
    return [
        (
            logits[row, start : min(start + ROWS, last)],
            ids[row, start + 1 : start + 1 + ROWS],
            None if teacher is None else teacher[row, start : min(start + ROWS, last)],
        )
        for row in range(len(ids))
        for start in range(0, last, ROWS)
    ]


def _predicted(ids: Tensor) -> int:
    return ids.shape[0] * (ids.shape[1] - 1)
