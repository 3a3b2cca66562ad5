"""Section `unlearn`: how to forget, and when to stop."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from tasks.params.base import Section


class Unlearn(Section):
    section: ClassVar[str] = "unlearn"

    method: Literal["gradient_ascent", "none"]
    forget_weight: PositiveFloat
    retain_weight: NonNegativeFloat
    rank: PositiveInt
    alpha: PositiveFloat
    steps: PositiveInt
    sequences: PositiveInt
    length: Annotated[int, Field(ge=2)]
    learning_rate: PositiveFloat
    warmup: Annotated[float, Field(ge=0, le=1)]
    clip: PositiveFloat
    forget_ceiling: PositiveFloat
    seed: NonNegativeInt
