"""Section `prune`: which weights go."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from compression.pruning.pattern import parse_pattern, parse_structures
from tasks.params.base import Section


class Prune(Section):
    section: ClassVar[str] = "prune"

    source: str
    method: Literal["magnitude", "wanda", "sparsegpt", "magnitude_obs", "wanda_obs", "alps", "surgeon", "none"]
    sparsity: Annotated[float, Field(ge=0, lt=1)]
    pattern: str
    scope: Literal["auto", "row", "layer", "columns", "adaptive"]
    sequences: PositiveInt
    length: PositiveInt
    passes: Annotated[int, Field(ge=1, le=2)]
    damping: PositiveFloat
    columns: PositiveInt
    choose: Literal["layer", "columns"]
    iterations: PositiveInt
    refit: NonNegativeInt
    bits: Literal[4, 8] | None
    group_size: PositiveInt

    @field_validator("pattern")
    @classmethod
    def _known(cls, pattern: str) -> str:
        if not parse_structures(pattern):
            parse_pattern(pattern)
        return pattern
