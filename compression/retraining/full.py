"""Every parameter learns, the mask kept: what PERP's few parameters are measured against (arXiv 2312.15230)."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from compression.retraining.parameters import Merge


def attach(
    model: nn.Module, keep: dict[str, Tensor], options: Mapping[str, Any]
) -> tuple[dict[str, nn.Parameter], Merge]:
    """Frees all parameters; the gradient of a pruned weight is zero, so AdamW without decay never moves it.

    Args:
        keep: masks bool [out, in] by layer.
        options: not looked at.

    Returns:
        all parameters, and a merge with nothing to do.
    """
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    for layer, mask in keep.items():
        weight = parameters[f"{layer}.weight"]
        weight.register_hook(mask.to(weight).mul)
    return parameters, lambda _: {}
