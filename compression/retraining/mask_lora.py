"""MaskLoRA: low-rank updates under the mask (PERP, arXiv 2312.15230), beside biases and norms where asked."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from compression.retraining.parameters import Merge, free
from compression.training.masked_linear import attach as attach_masked


def attach(
    model: nn.Module, keep: dict[str, Tensor], options: Mapping[str, Any]
) -> tuple[dict[str, nn.Parameter], Merge]:
    """Puts a masked low-rank update on every pruned layer.

    Args:
        keep: masks bool [out, in] by layer.
        options: rank, alpha, seed; biases, norms: bool.

    Returns:
        A and B of every layer and the freed parameters, and a merge that gives every layer's W'.
    """
    layers = attach_masked(model, keep, options["rank"], options["alpha"], options["seed"])
    parameters = free(model, biases=options["biases"], norms=options["norms"])
    for name, layer in layers.items():
        parameters |= {f"{name}.A": layer.A, f"{name}.B": layer.B}

    def merge(stored: dict[str, Tensor]) -> dict[str, Tensor]:
        return {f"{name}.weight": layer.merged(stored[f"{name}.weight"]) for name, layer in layers.items()}

    return parameters, merge
