"""Cross entropy over a large vocabulary: logits are the largest tensor of a training step, so few copies are made."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

ROWS = 64  # tokens whose float32 logits are alive at a time


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
    """The gradient is made beside the loss, from the same softmax: logits need not be kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, teacher: Tensor | None, share: float) -> Tensor:
        tokens = ids.shape[0] * (ids.shape[1] - 1)
        total = torch.zeros((), device=logits.device, dtype=torch.float64)
        slope = torch.empty_like(logits) if logits.requires_grad else None
        mine, yours = (torch.empty(ROWS, logits.shape[2], device=logits.device) for _ in range(2))
        for row, here, following in _parts(ids):
            own, places = logits[row, here], torch.arange(len(following), device=logits.device)
            p, log_sum = _softmax(own, mine)
            total += (1 - share) * (log_sum - own[places, following]).sum()
            if teacher is not None:
                theirs = teacher[row, here]
                q, other_sum = _softmax(theirs, yours)
                total += share * ((q * (theirs.float() - own)).sum(1) - other_sum + log_sum).sum()
                p.sub_(q, alpha=share)
            if slope is not None:
                p[places, following] -= 1 - share
                slope[row, here] = p.mul_(1 / tokens)
        if slope is not None:
            slope[:, -1] = 0
        ctx.save_for_backward(slope)
        return (total / tokens).float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (slope,) = ctx.saved_tensors
        return slope.mul_(grad.to(slope.dtype)), None, None, None


def _softmax(logits: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """softmax of logits [n, V] in float32, in the first rows of `out`, and log sum exp [n]: no new memory, which costs
    more time than what is computed there."""
    p = out[: len(logits)].copy_(logits)
    top = p.amax(1, keepdim=True)
    sums = p.sub_(top).exp_().sum(1, keepdim=True)
    p.div_(sums)
    return p, (sums.log() + top).squeeze(1)


def _parts(ids: Tensor) -> list[tuple[int, slice, Tensor]]:
    """At most ROWS tokens of a sequence each: its row, the tokens' places, the tokens that follow them [n]."""
    last = ids.shape[1] - 1
    return [
        (row, slice(start, min(start + ROWS, last)), ids[row, start + 1 : start + 1 + ROWS])
        for row in range(len(ids))
        for start in range(0, last, ROWS)
    ]
