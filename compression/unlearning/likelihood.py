"""How likely a model finds answers: losses over answer tokens alone, in float32 whatever the type of the logits."""

import torch.nn.functional as F
from torch import Tensor

from compression.training.samples import Samples


def predictions(logits: Tensor, samples: Samples) -> Tensor:
    """The logits that predict the answer tokens, row by row: [N, T, V] -> float32 [answer tokens, V]."""
    places = samples.answer.flatten().nonzero().squeeze(1) - 1  # never a row's first token, so these are of its row
    return logits.flatten(0, 1).index_select(0, places).float()


def token_losses(logits: Tensor, samples: Samples) -> Tensor:
    """-log p of every answer token in nats, row by row, float32 [answer tokens]."""
    return F.cross_entropy(predictions(logits, samples), samples.ids[samples.answer], reduction="none")


def mean_loss(losses: Tensor) -> Tensor:
    """The mean over tokens, a scalar; zero where there is no token."""
    return losses.sum() / max(1, len(losses))


def sequence_losses(losses: Tensor, samples: Samples) -> Tensor:
    """-log p(y | x) of every row in nats, [N], from the losses of its tokens; zero for a row without an answer."""
    rows = samples.answer.nonzero()[:, 0]
    return losses.new_zeros(len(samples.ids)).index_add(0, rows, losses)


def lengths(samples: Samples) -> Tensor:
    """|y|, the answer tokens of every row, int64 [N]; 1 for a row without an answer, by which nothing is divided."""
    return samples.answer.sum(1).clamp(min=1)


def mean_of_rows(losses: Tensor, samples: Samples) -> Tensor:
    """The mean over the answer of every row, then over the rows that have one: a long answer counts no more."""
    means = sequence_losses(losses, samples) / lengths(samples)
    return means.sum() / samples.answer.any(1).sum().clamp(min=1)


def divergences(start: Tensor, logits: Tensor, samples: Samples) -> Tensor:
    """KL(p0 || p) over the vocabulary where each answer token is predicted, in nats, float32 [answer tokens].

    Args:
        start: logits of p0 [N, T, V].
        logits: of p, the same shape.
    """
    wanted, told = (F.log_softmax(predictions(each, samples), 1) for each in (start, logits))
    return F.kl_div(told, wanted, reduction="none", log_target=True).sum(1)
