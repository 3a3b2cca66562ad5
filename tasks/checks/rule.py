"""The type of a rule, and what several rules ask."""

from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase

from compression.core.errors import Problem
from tasks.params.base import PARAMS

Rule = Callable[..., Iterator[Problem]]


def targets_match(section: str, targets: Iterable[str], layers: dict[str, list[int]]) -> Iterator[Problem]:
    """Every pattern of a section's `targets` matches a layer; nothing is said before a model has been downloaded."""
    for pattern in targets if layers else []:
        if not any(fnmatchcase(layer, pattern) for layer in layers):
            yield Problem(
                f"{PARAMS}: {section}.targets",
                f"`{pattern}` matches no layer",
                "valid: patterns of names such as " + ", ".join(list(layers)[:7]),
            )
