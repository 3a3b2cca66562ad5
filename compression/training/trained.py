"""What of a model is trained, and how it gets back into the file."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from fnmatch import fnmatchcase
from typing import NamedTuple, TypeVar

from torch import Tensor, nn

from compression.core.errors import Problem

T = TypeVar("T")


class Trained(NamedTuple):
    """
    Attributes:
        parameters: by name.
        at_start: within it the model computes with what training began with, and there is no second copy of it.
        rewritten: given all tensors as they are stored, by full name, those that training has changed; and what share
            of them that is, by what they are.
    """

    parameters: dict[str, nn.Parameter]
    at_start: Callable[[], AbstractContextManager[None]]
    rewritten: Callable[[dict[str, Tensor]], tuple[dict[str, Tensor], dict[str, float]]]


def targeted(every: Mapping[str, T], patterns: list[str], key: str) -> dict[str, T]:
    """What belongs to the layers that one of the patterns matches; all of it if there is no pattern.

    Args:
        every: by layer.
        key: of params.yaml, where the patterns are.

    Raises:
        Problem: a pattern that matches no layer.
    """
    for pattern in patterns:
        if not any(fnmatchcase(layer, pattern) for layer in every):
            raise Problem(
                f"params.yaml: {key}",
                f"`{pattern}` matches no layer",
                "valid: patterns of names such as " + ", ".join(list(every)[:7]),
            )
    chosen = [layer for layer in every if not patterns or any(fnmatchcase(layer, pattern) for pattern in patterns)]
    return {layer: every[layer] for layer in chosen}
