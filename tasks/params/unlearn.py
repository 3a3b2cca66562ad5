"""Section `unlearn`: how to forget, and when to stop."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from tasks.params.base import Section


class Unlearn(Section):
    section: ClassVar[str] = "unlearn"

    method: Literal["gradient_ascent", "grad_diff", "llmu", "npo", "simnpo", "dpo", "refuse", "rmu", "undial", "none"]
    forget_weight: PositiveFloat
    retain_weight: NonNegativeFloat
    random_weight: NonNegativeFloat
    beta: PositiveFloat | None
    delta: float | None
    block: NonNegativeInt | None
    steering: PositiveFloat | None
    refusals: list[str]
    train: Literal["codes", "scales"]
    targets: list[str]
    rank: PositiveInt
    alpha: PositiveFloat
    steps: PositiveInt
    sequences: PositiveInt
    length: Annotated[int, Field(ge=2)]
    prompt: PositiveInt
    learning_rate: PositiveFloat
    warmup: Annotated[float, Field(ge=0, le=1)]
    clip: PositiveFloat
    forget_ceiling: PositiveFloat | Literal["reference", "control"] | None
    retain_ceiling: PositiveFloat | None
    kl_ceiling: PositiveFloat | None
    seconds: PositiveFloat | None
    held_out: PositiveInt
    check_every: PositiveInt
    seed: NonNegativeInt
