"""PERP's cheapest arms: biases, norms and whatever else is named, no adapters (arXiv 2312.15230)."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from compression.retraining.parameters import Merge, free


def attach(
    model: nn.Module, keep: dict[str, Tensor], options: Mapping[str, Any]
) -> tuple[dict[str, nn.Parameter], Merge]:
    """Frees the parameters that `options` names.

    Args:
        options: biases, norms, head, embeddings: bool.

    Returns:
        the freed parameters, and a merge with nothing to do.
    """
    return free(model, options), lambda _: {}
