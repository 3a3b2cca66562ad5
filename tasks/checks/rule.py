"""The type of a rule."""

from collections.abc import Callable, Iterator

from compression.core.errors import Problem

Rule = Callable[..., Iterator[Problem]]
