"""NPO without a start model, by the mean of an answer's tokens: SimNPO (Fan et al. 2024, arXiv 2410.07163, equation 4).

    L = forget_weight * mean over rows of -2 / beta * log sigma(beta * (NLL / |y| - delta))
        + retain_weight * mean NLL a token (retained)

with |y| the answer's tokens; in the paper's letters delta is gamma / beta.
"""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from compression.unlearning.draw import Draw
from compression.unlearning.likelihood import lengths, mean_loss, sequence_losses, token_losses

SETTINGS = {"beta": 4.5, "delta": 0.0}


def loss(draw: Draw, options: Mapping[str, Any]) -> tuple[Tensor, dict[str, float]]:
    """See compression.unlearning."""
    beta, delta = options["beta"], options["delta"]
    of_forget, of_retain = draw.learner.logits(draw.forget, draw.retain)
    now = token_losses(of_forget, draw.forget)
    above = sequence_losses(now, draw.forget) / lengths(draw.forget) - delta
    retain = mean_loss(token_losses(of_retain, draw.retain))
    value = options["forget_weight"] * -2 / beta * F.logsigmoid(beta * above).mean() + options["retain_weight"] * retain
    return value, {"forget": mean_loss(now).item(), "retain": retain.item()}
