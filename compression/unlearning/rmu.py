"""Representation misdirection: RMU (Li et al. 2024, arXiv 2403.03218, section 4, equations 1 to 3).

    L = forget_weight * mean (h - c u)^2 (to be forgotten) + retain_weight * mean (h - h0)^2 (retained)

h     hidden states behind block `block` at the answers' tokens, h0 those of the start model; means are over tokens and
      entries, as in the released code (the paper sums over the d entries of a state)
u     a fixed direction: uniform random numbers, of length 1
c     `steering`

Blocks behind that one are not computed and do not learn. The paper trains three of the MLPs that end there: `targets`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from compression.unlearning.draw import Draw

SETTINGS = {"block": 7, "steering": 20.0}


def loss(draw: Draw, options: Mapping[str, Any]) -> tuple[Tensor, dict[str, float]]:
    """See compression.unlearning."""
    forget, retain = draw.learner.states(options["block"], draw.forget, draw.retain)
    (start,) = draw.learner.start_states(options["block"], draw.retain)
    there = options["steering"] * direction(forget.shape[2], options["seed"]).to(forget.device)
    steered = _mean_square(forget[draw.forget.answer].float() - there)
    kept = _mean_square((retain.float() - start.float())[draw.retain.answer])
    value = options["forget_weight"] * steered + options["retain_weight"] * kept
    return value, {"steered": steered.item(), "kept": kept.item()}


def direction(width: int, seed: int) -> Tensor:
    """u [width], the same in every step."""
    drawn = torch.rand(width, generator=torch.Generator().manual_seed(seed))
    return drawn / drawn.norm()


def _mean_square(differences: Tensor) -> Tensor:
    """Zero where there is no token."""
    return differences.square().sum() / max(1, differences.numel())
