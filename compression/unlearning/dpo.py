"""Preference for "I don't know" over the answer to be forgotten: DPO (Rafailov et al. 2023, arXiv 2305.18290,
equation 7) with such winners (Maini et al. 2024, arXiv 2401.06121, section 4), retained text beside it.

    L = forget_weight * mean over rows of -2 / beta * log sigma(beta * (D(y') - D(y)))
        + retain_weight * mean NLL a token (retained)

with D(y) = log(p(y | x) / p0(y | x)), y the answer to be forgotten and y' one of the refusals, drawn at random.
The factor 2, of open-unlearning (arXiv 2506.12618), makes beta mean what it does in NPO.
"""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from compression.unlearning.answers import answered_anew
from compression.unlearning.draw import Draw
from compression.unlearning.likelihood import mean_loss, sequence_losses, token_losses

SETTINGS = {"beta": 0.1, "refusals": ["I don't know."]}


def loss(draw: Draw, options: Mapping[str, Any]) -> tuple[Tensor, dict[str, float]]:
    """See compression.unlearning."""
    beta = options["beta"]
    refused = answered_anew(draw.forget, draw.refusals, draw.generator)
    of_forget, of_refused, of_retain = draw.learner.logits(draw.forget, refused, draw.retain)
    start_forget, start_refused = draw.learner.start_logits(draw.forget, refused)
    now, wanted = token_losses(of_forget, draw.forget), token_losses(of_refused, refused)
    lost = sequence_losses(now - token_losses(start_forget, draw.forget), draw.forget)  # -D(y)
    won = -sequence_losses(wanted - token_losses(start_refused, refused), refused)  # D(y')
    retain = mean_loss(token_losses(of_retain, draw.retain))
    value = (
        options["forget_weight"] * -2 / beta * F.logsigmoid(beta * (won + lost)).mean()
        + options["retain_weight"] * retain
    )
    return value, {"forget": mean_loss(now).item(), "refuse": mean_loss(wanted).item(), "retain": retain.item()}
