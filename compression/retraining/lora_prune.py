"""LoRA-Prune: ordinary low-rank updates, cut down to the mask at the end (PERP, arXiv 2312.15230)."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from compression.retraining.parameters import Merge, adapt
from compression.training.masked_linear import LORA_PRUNE, MASK_LORA


def attach(
    model: nn.Module, keep: dict[str, Tensor], options: Mapping[str, Any]
) -> tuple[dict[str, nn.Parameter], Merge]:
    """W + s B A for every pruned layer in training; arguments and result as in `parameters.adapt`.

    The merge drops what lies outside the mask, in the model as well, so that the loss after it tells of the jump.
    """
    parameters, layers, merge_masked = adapt(model, keep, options, LORA_PRUNE)

    def merge(stored: dict[str, Tensor]) -> dict[str, Tensor]:
        for layer in layers.values():
            layer.form = MASK_LORA
        return merge_masked(stored)

    return parameters, merge
