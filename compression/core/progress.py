"""Progress of long loops: a bar on a terminal, silence elsewhere."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def progress(items: Iterable[T], *, what: str, unit: str, total: int | None = None, done: int = 0) -> Iterator[T]:
    """Iterates over `items` under a bar with rate and time left; `done` items were finished earlier."""
    yield from tqdm(items, desc=what, unit=unit, total=total, initial=done, disable=None, leave=False)
