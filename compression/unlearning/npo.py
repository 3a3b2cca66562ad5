"""Negative preference optimisation (Zhang et al. 2024, arXiv 2404.05868, equation 3), retained text beside it.

    L = forget_weight * mean over rows of -2 / beta * log sigma(-beta * log(p(y | x) / p0(y | x)))
        + retain_weight * mean NLL a token (retained)

Ascent whose gradient fades as the answer becomes less likely than it was at the start. As beta goes to zero it is plain
ascent on the sum over tokens.
"""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from compression.unlearning.draw import Draw
from compression.unlearning.likelihood import mean_loss, sequence_losses, token_losses

SETTINGS = {"beta": 0.1}


def loss(draw: Draw, options: Mapping[str, Any]) -> tuple[Tensor, dict[str, float]]:
    """See compression.unlearning."""
    beta = options["beta"]
    of_forget, of_retain = draw.learner.logits(draw.forget, draw.retain)
    (start,) = draw.learner.start_logits(draw.forget)
    now, before = (token_losses(logits, draw.forget) for logits in (of_forget, start))
    lost = sequence_losses(now - before, draw.forget)  # -log(p / p0)
    retain = mean_loss(token_losses(of_retain, draw.retain))
    value = options["forget_weight"] * -2 / beta * F.logsigmoid(beta * lost).mean() + options["retain_weight"] * retain
    return value, {"forget": mean_loss(now).item(), "retain": retain.item()}
