"""Gradient ascent on what is to be forgotten, and nothing else (Jang et al. 2022, arXiv 2210.01504, equation 1).

    L = -forget_weight * mean NLL a token

Nothing is retained on purpose: a ceiling has to stop it.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from compression.unlearning.draw import Draw
from compression.unlearning.likelihood import mean_loss, token_losses

SETTINGS: dict[str, Any] = {}


def loss(draw: Draw, options: Mapping[str, Any]) -> tuple[Tensor, dict[str, float]]:
    """See compression.unlearning."""
    (logits,) = draw.learner.logits(draw.forget)
    forget = mean_loss(token_losses(logits, draw.forget))
    return -options["forget_weight"] * forget, {"forget": forget.item()}
