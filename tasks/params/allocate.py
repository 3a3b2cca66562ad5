"""Section `allocate`: how sparsity is dealt out over the layers."""

import difflib
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Annotated, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from compression.core.errors import Problem
from tasks.params.base import PARAMS, Section

Share = Annotated[float, Field(ge=0, lt=1)]


class Allocate(Section):
    section: ClassVar[str] = "allocate"

    rule: Literal["uniform", "owl", "pmpq", "global"]
    spread: Annotated[float, Field(ge=0)]
    low: Share
    high: Share
    dense: list[str]

    @field_validator("high")
    @classmethod
    def _above_low(cls, high: float, info: ValidationInfo) -> float:
        if high < info.data.get("low", 0):
            raise ValueError(f"has to be at least allocate.low, {info.data['low']}")
        return high


def dense_layers(patterns: Iterable[str], layers: Iterable[str]) -> set[str]:
    """Those of the layers' full names that one of the shell patterns matches.

    Raises:
        Problem: a pattern that matches none.
    """
    names, found = list(layers), set()
    for pattern in patterns:
        matched = [name for name in names if fnmatchcase(name, pattern)]
        if not matched:
            nearest = difflib.get_close_matches(pattern, names, n=1, cutoff=0)
            raise Problem(f"{PARAMS}: allocate.dense", f"`{pattern}` matches no layer", f"nearest: `{nearest[0]}`")
        found.update(matched)
    return found
