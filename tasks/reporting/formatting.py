"""Numbers and words for people. A number that is not known is an en dash."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

DASH = "–"
STRUCTURES = {"units": "hidden units", "heads": "key/value heads", "hidden": "dimensions of the residual stream"}


def number(value: float | None, digits: int = 1, unit: str = "", sign: bool = False) -> str:
    if value is None:
        return DASH
    return f"{value:{'+' if sign else ''},.{digits}f}".replace("-", "−") + (f"\u00a0{unit}" if unit else "")


def percent(share: float | None, digits: int = 1) -> str:
    """A share from 0 to 1 as a percentage."""
    return number(None if share is None else share * 100, digits, "%")


def interval(estimate: tuple[float, float, float] | None) -> str:
    """The 95 % interval of a share: 12 to 34 %."""
    return "" if estimate is None else f"{number(estimate[1] * 100, 0)} to {percent(estimate[2], 0)}"


def megabytes(size: float) -> str:
    """Bytes in millions."""
    return number(size / 1e6)


def perplexity(value: float | None) -> str:
    """Fewer decimal places the larger it is: perplexities span from 5 to 100,000 and more."""
    return number(value, 2 if value is None or value < 10 else 1 if value < 1000 else 0)


def times(ratio: float | None) -> str:
    """A ratio as a multiple: ×1.37."""
    if ratio is None:
        return DASH
    return "×" + number(ratio, 2 if ratio < 10 else 1 if ratio < 100 else 0)


def ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None


def rise(value: float | None, base: float | None) -> float | None:
    return value - base if value is not None and base is not None else None


def listed(words: Sequence[str]) -> str:
    """One, two and three."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def structures(widths: Mapping[str, int]) -> str:
    """How many structures of each kind there are: 1,280 hidden units and 2 key/value heads."""
    return listed([f"{number(width, 0)} {STRUCTURES.get(kind, kind)}" for kind, width in widths.items()])


def setting(value: Any) -> str:
    """A parameter as params.yaml has it."""
    return value if isinstance(value, str) else json.dumps(value)
