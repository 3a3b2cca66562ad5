"""Negative log-likelihood of texts, a block of the model at a time."""

import torch
import torch.nn.functional as F
from torch import Tensor

from compression.core import batches
from compression.core.progress import progress
from compression.core.skeleton import Skeleton

HEAD_TOKENS = 1024  # logits are vocabulary times as large as ids: as few at a time as keep the matrix unit busy


@torch.no_grad()
def token_losses(skeleton: Skeleton, texts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Loss of every predicted token, all texts in one walk through the blocks.

    Args:
        texts: ids int64 [N, T] by name; N and T may differ from text to text.

    Returns:
        float32 [N, T - 1] by name: -log p(token | the tokens before it in its sequence), in nats. A sequence's
        figures do not depend on which others it is evaluated with.
    """
    split = {name: batches.split(ids, skeleton.device) for name, ids in texts.items()}
    hidden = {name: [skeleton.begin(ids) for ids in parts] for name, parts in split.items()}
    for index in progress(range(skeleton.depth), what="evaluate", unit="block"):
        skeleton.load(index)
        for name, parts in split.items():
            for part, ids in enumerate(parts):
                hidden[name][part] = skeleton.run(index, hidden[name][part], ids)
        skeleton.release(index)
    return {
        name: torch.cat([head_losses(skeleton, states, ids) for states, ids in zip(hidden[name], parts, strict=True)])
        for name, parts in split.items()
    }


def head_losses(skeleton: Skeleton, hidden: Tensor, ids: Tensor) -> Tensor:
    """States after the last block [N, T, d] -> float32 [N, T - 1], the loss of each predicted token in nats."""
    rows = max(1, HEAD_TOKENS // ids.shape[1])
    losses = []
    for states, own in zip(hidden.split(rows), ids.split(rows), strict=True):
        logits = skeleton.end(states, own)[:, :-1].float()
        target = own[:, 1:].to(logits.device)
        losses.append(F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view(target.shape))
    return torch.cat(losses).cpu()
