"""Ascent on what is to be forgotten, descent on what is retained: GradDiff (Liu et al. 2022, arXiv 2203.12817).

L = retain_weight * mean NLL a token (retained) - forget_weight * mean NLL a token (to be forgotten)
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from compression.unlearning.draw import Draw
from compression.unlearning.likelihood import mean_loss, token_losses

SETTINGS: dict[str, Any] = {}


def loss(draw: Draw, options: Mapping[str, Any]) -> tuple[Tensor, dict[str, float]]:
    """See compression.unlearning."""
    both = draw.forget, draw.retain
    forget, retain = (
        mean_loss(token_losses(logits, samples))
        for logits, samples in zip(draw.learner.logits(*both), both, strict=True)
    )
    value = options["retain_weight"] * retain - options["forget_weight"] * forget
    return value, {"forget": forget.item(), "retain": retain.item()}
