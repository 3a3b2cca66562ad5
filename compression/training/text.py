"""Which sequences a step sees, and the loss on them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compression.training.cross_entropy import mixed_cross_entropy
from compression.training.samples import Samples


class Shuffled:
    """Draws sequences without repeating any before all were seen; the step's number alone decides which.

    Args:
        ids: int64 [N, T].
        batch: sequences a step.
    """

    def __init__(self, ids: Tensor, batch: int, seed: int) -> None:
        self.ids, self.batch, self.seed = ids, batch, seed

    def __call__(self, step: int) -> Tensor:
        """ids [batch, T] of a step."""
        positions = range(step * self.batch, (step + 1) * self.batch)
        rows = [self._order(position // len(self.ids))[position % len(self.ids)] for position in positions]
        return self.ids[torch.stack(rows)]

    def _order(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(len(self.ids), generator=generator)


def next_token_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean loss in nats over the predicted tokens of ids [N, T], in float32."""
    ids = ids.to(next(model.parameters()).device)
    return mixed_cross_entropy(model(input_ids=ids, use_cache=False).logits, ids)


def distillation_loss(model: nn.Module, teacher: nn.Module, ids: Tensor, share: float) -> Tensor:
    """(1 - share) * next_token_loss + share * KL(teacher || model), in nats over the predicted tokens of ids [N, T]."""
    ids = ids.to(next(model.parameters()).device)
    with torch.no_grad():
        wanted = teacher(input_ids=ids, use_cache=False).logits
    return mixed_cross_entropy(model(input_ids=ids, use_cache=False).logits, ids, wanted, share)


def answer_loss(model: nn.Module, samples: Samples) -> Tensor:
    """Mean loss in nats over the answer tokens of a batch, in float32."""
    device = next(model.parameters()).device
    ids, answer = samples.ids.to(device), samples.answer.to(device)[:, 1:]
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits[answer].float(), ids[:, 1:][answer])
