"""Gradient ascent on the text to forget, ordinary descent on the text to retain.

theta <- theta - eps_1 grad L_fgt - eps_3 grad L_nor with L_fgt = -CE(forget) (Gundavarapu et al. 2024,
arXiv 2405.15152, section 3; GradDiff in the words of open-unlearning). The retained term is the plain loss.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def combine(forget: Tensor, retain: Tensor, options: Mapping[str, Any]) -> Tensor:
    """forget_weight * (-L(forget)) + retain_weight * L(retain), a scalar in nats a token."""
    loss: Tensor = options["retain_weight"] * retain - options["forget_weight"] * forget
    return loss
