"""Three losses: ascent on the answer, random answers, and KL to the start model (Yao et al. 2023, arXiv 2310.10683,
section 3, "LLMU"; with weights of 0.5, 1 and 1 Gundavarapu et al. 2024, arXiv 2405.15152, section 3.1).

    L = -forget_weight * L_fgt + random_weight * L_rdn + retain_weight * L_nor

L_fgt    mean NLL a token of the answers to be forgotten
L_rdn    the same of retained answers, drawn at random, behind the prompts of these
L_nor    mean over the retained answers' tokens of KL(p0 || p)

L_fgt and L_rdn are means over each row's tokens, then over rows, as in the released code. There L_rdn trains the
prompt, too, and L_nor is taken over padding as well; here only answers count, as the papers have it. One random answer
stands behind a prompt in a step, another one in the next; it is cut to the length of the answers that it stands for.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from compression.unlearning.answers import answered_anew
from compression.unlearning.draw import Draw
from compression.unlearning.likelihood import divergences, mean_loss, mean_of_rows, token_losses

SETTINGS = {"random_weight": 1.0}


def loss(draw: Draw, options: Mapping[str, Any]) -> tuple[Tensor, dict[str, float]]:
    """See compression.unlearning."""
    random = answered_anew(draw.forget, draw.answers, draw.generator, draw.forget.ids.shape[1])
    of_forget, of_random, of_retain = draw.learner.logits(draw.forget, random, draw.retain)
    (start,) = draw.learner.start_logits(draw.retain)
    forget = mean_of_rows(token_losses(of_forget, draw.forget), draw.forget)
    other = mean_of_rows(token_losses(of_random, random), random)
    kl = mean_loss(divergences(start, of_retain, draw.retain))
    value = -options["forget_weight"] * forget + options["random_weight"] * other + options["retain_weight"] * kl
    return value, {"forget": forget.item(), "random": other.item(), "kl": kl.item()}
