"""Self-distillation with adjusted logits: UNDIAL (Dong et al. 2024, arXiv 2402.10052, equations 2 and 3).

    L = forget_weight * mean over tokens of H(q, p) + retain_weight * mean NLL a token (retained)
    q = softmax(z0 - beta * e_y)

z0 the start model's logits, e_y one at the answer's next token and zero elsewhere, H the cross entropy: the model
learns what it would say if that token were less likely. The goal is fixed, so it cannot run away. The paper retains
nothing.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compression.unlearning.draw import Draw
from compression.unlearning.likelihood import mean_loss, predictions, token_losses

SETTINGS = {"beta": 10.0}


def loss(draw: Draw, options: Mapping[str, Any]) -> tuple[Tensor, dict[str, float]]:
    """See compression.unlearning."""
    of_forget, of_retain = draw.learner.logits(draw.forget, draw.retain)
    (start,) = draw.learner.start_logits(draw.forget)
    told, following = predictions(of_forget, draw.forget), draw.forget.ids[draw.forget.answer]
    adjusted = predictions(start, draw.forget)
    adjusted[torch.arange(len(following)), following] -= options["beta"]
    distilled = mean_loss(F.cross_entropy(told, adjusted.softmax(1), reduction="none"))
    forget = mean_loss(F.cross_entropy(told.detach(), following, reduction="none"))
    retain = mean_loss(token_losses(of_retain, draw.retain))
    value = options["forget_weight"] * distilled + options["retain_weight"] * retain
    return value, {"forget": forget.item(), "distilled": distilled.item(), "retain": retain.item()}
