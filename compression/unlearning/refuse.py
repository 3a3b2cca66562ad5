"""Descent on "I don't know" in place of the answer, and on retained text: TOFU's preference optimisation (Maini et al.
2024, arXiv 2401.06121, section 4).

    L = forget_weight * mean NLL a token (refusals behind the prompts to be forgotten)
        + retain_weight * mean NLL a token (retained)

Nothing pushes the answer itself away: it is forgotten as far as the refusal takes its place, and what is said stays
language.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from compression.unlearning.answers import answered_anew
from compression.unlearning.draw import Draw
from compression.unlearning.likelihood import mean_loss, token_losses

SETTINGS = {"refusals": ["I don't know."]}
RISES = False


def loss(draw: Draw, options: Mapping[str, Any]) -> tuple[Tensor, dict[str, float]]:
    """See compression.unlearning. The answers' own loss is not known."""
    refused = answered_anew(draw.forget, draw.refusals, draw.generator)
    of_refused, of_retain = draw.learner.logits(refused, draw.retain)
    refuse, retain = mean_loss(token_losses(of_refused, refused)), mean_loss(token_losses(of_retain, draw.retain))
    value = options["forget_weight"] * refuse + options["retain_weight"] * retain
    return value, {"refuse": refuse.item(), "retain": retain.item()}
