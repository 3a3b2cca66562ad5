"""What a model says of each token of a text, a block of the model at a time.

The walk through the blocks gives the states behind the last one; each figure is made from them by the head alone:

    -log p(x_t | x_<t)                   the loss, in nats
    x_t = argmax_z p(z | x_<t)           whether greedy decoding would have written the token
    (log p(x_t | x_<t) - m_t) / s_t      m_t and s_t: mean and standard deviation of log p(z | x_<t) for z drawn from p;
                                         Min-K++ (Zhang et al. 2024, arXiv 2404.02936) takes the lowest of them
    KL(p || q)                           of two models at the same place
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from compression.core import batches
from compression.core.progress import progress
from compression.core.skeleton import Skeleton

HEAD_TOKENS = 1024  # logits are vocabulary times as large as ids: as few at a time as keep the matrix unit busy
DISTRIBUTIONS = 64  # of so many tokens at a time, where every entry counts: they stay in the cache
LEAST_SPREAD = 1e-6  # of log p, where a model is so sure that nothing is left to divide by

States = list[tuple[Tensor, Tensor]]  # by batch: the states [n, T, d] behind the last block, and the ids [n, T]


class TokenFigures(NamedTuple):
    """Of every predicted token, all [N, T - 1], on the CPU.

    Attributes:
        loss: float32, in nats.
        greedy: bool, whether the token is the arg max.
        standardised: float32, log p in standard deviations from its mean.
    """

    loss: Tensor
    greedy: Tensor
    standardised: Tensor


@torch.no_grad()
def last_states(skeleton: Skeleton, texts: dict[str, Tensor]) -> dict[str, States]:
    """All texts in one walk through the blocks.

    Args:
        texts: ids int64 [N, T] by name; N and T may differ from text to text.
    """
    split = {name: batches.split(ids, skeleton.device) for name, ids in texts.items()}
    hidden = {name: [skeleton.begin(ids) for ids in parts] for name, parts in split.items()}
    for index in progress(range(skeleton.depth), what="evaluate", unit="block"):
        skeleton.load(index)
        for name, parts in split.items():
            for part, ids in enumerate(parts):
                hidden[name][part] = skeleton.run(index, hidden[name][part], ids)
        skeleton.release(index)
    return {name: list(zip(hidden[name], parts, strict=True)) for name, parts in split.items()}


def token_losses(skeleton: Skeleton, texts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Loss of every predicted token, all texts in one walk through the blocks.

    Args:
        texts: ids int64 [N, T] by name; N and T may differ from text to text.

    Returns:
        float32 [N, T - 1] by name: -log p(token | the tokens before it in its sequence), in nats. A sequence's
        figures do not depend on which others it is evaluated with.
    """
    return {name: state_losses(skeleton, states) for name, states in last_states(skeleton, texts).items()}


def state_losses(skeleton: Skeleton, states: States) -> Tensor:
    """float32 [N, T - 1], the loss of each predicted token in nats."""
    return torch.cat([head_losses(skeleton, hidden, ids) for hidden, ids in states])


@torch.no_grad()
def head_losses(skeleton: Skeleton, hidden: Tensor, ids: Tensor) -> Tensor:
    """States after the last block [N, T, d] -> float32 [N, T - 1], the loss of each predicted token in nats."""
    rows = max(1, HEAD_TOKENS // ids.shape[1])
    losses = []
    for states, own in zip(hidden.split(rows), ids.split(rows), strict=True):
        logits = skeleton.end(states, own)[:, :-1].float()
        target = own[:, 1:].to(logits.device)
        losses.append(F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view(target.shape))
    return torch.cat(losses).cpu()


@torch.no_grad()
def token_figures(skeleton: Skeleton, states: States) -> TokenFigures:
    """See the module's docstring; a row's figures do not depend on the rows beside it."""
    found = []
    for hidden, ids in states:
        rows = max(1, HEAD_TOKENS // ids.shape[1])
        for own, batch in zip(hidden.split(rows), ids.split(rows), strict=True):
            logits = skeleton.end(own, batch)[:, :-1].flatten(0, 1)
            target = batch[:, 1:].flatten().to(logits.device)
            pieces = zip(logits.split(DISTRIBUTIONS), target.split(DISTRIBUTIONS), strict=True)
            found += [_figures(*piece) for piece in pieces]
    shape = (sum(len(ids) for _, ids in states), -1)
    return TokenFigures(*(torch.cat(figure).view(shape).cpu() for figure in zip(*found, strict=True)))


@torch.no_grad()
def divergence(first: Skeleton, states: States, second: Skeleton, others: States) -> Tensor:
    """KL(first || second) at every predicted token, float32 [N, T - 1] in nats; few logits are alive at a time.

    Args:
        states, others: of the same ids, as `last_states` of each model gives them.
    """
    found = []
    for (hidden, ids), (other, _) in zip(states, others, strict=True):
        for mine, yours, row in zip(hidden.split(1), other.split(1), ids.split(1), strict=True):
            pairs = zip(
                first.end(mine, row)[0, :-1].split(DISTRIBUTIONS),
                second.end(yours, row)[0, :-1].split(DISTRIBUTIONS),
                strict=True,
            )
            for p, q in pairs:
                log_p, log_q = p.float().log_softmax(1), q.float().log_softmax(1)
                found.append((log_p.exp() * (log_p - log_q)).sum(1).cpu())
    return torch.cat(found).view(sum(len(ids) for _, ids in states), -1)


def _figures(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """loss, greedy and standardised [n] of tokens [n], given what predicts them [n, V]."""
    log_p = logits.float().log_softmax(1)
    p = log_p.exp()
    mean = (p * log_p).sum(1)
    spread = (p * (log_p - mean[:, None]).square()).sum(1).sqrt()
    own = log_p.gather(1, target[:, None])[:, 0]
    return -own, log_p.argmax(1) == target, (own - mean) / spread.clamp_min(LEAST_SPREAD)
