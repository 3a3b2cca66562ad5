"""Losses of a whole model, a token at a time."""

import math

import torch
from torch import Tensor, nn


@torch.no_grad()
def token_losses(model: nn.Module, ids: Tensor) -> Tensor:
    """float64 [N, T - 1]: -log p of each token, after running the whole model on the tokens before it."""
    rows = []
    for sequence in ids.tolist():
        losses = []
        for place in range(1, len(sequence)):
            logits = model(input_ids=torch.tensor([sequence[:place]])).logits[0, -1].double().tolist()
            top = max(logits)
            total = top + math.log(sum(math.exp(logit - top) for logit in logits))
            losses.append(total - logits[sequence[place]])
        rows.append(losses)
    return torch.tensor(rows, dtype=torch.float64)
