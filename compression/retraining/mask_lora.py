"""MaskLoRA: low-rank updates under the mask (PERP, arXiv 2312.15230), beside the parameters that are freed."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from compression.retraining.parameters import Merge, adapt
from compression.training.masked_linear import MASK_LORA


def attach(
    model: nn.Module, keep: dict[str, Tensor], options: Mapping[str, Any]
) -> tuple[dict[str, nn.Parameter], Merge]:
    """W + s M o (B A) for every pruned layer; arguments and result as in `parameters.adapt`."""
    parameters, _, merge = adapt(model, keep, options, MASK_LORA)
    return parameters, merge
