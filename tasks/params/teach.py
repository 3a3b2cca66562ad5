"""Section `teach`: whether the dense model first learns the text to forget by heart, and how."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from tasks.params.base import Section


class Teach(Section):
    section: ClassVar[str] = "teach"

    method: Literal["lora", "none"]
    rank: PositiveInt
    alpha: PositiveFloat
    targets: list[str]
    steps: PositiveInt
    sequences: PositiveInt
    mix: Annotated[float, Field(ge=0, lt=1)]
    length: Annotated[int, Field(ge=2)]
    learning_rate: PositiveFloat
    warmup: Annotated[float, Field(ge=0, le=1)]
    clip: PositiveFloat
    until: Annotated[float, Field(gt=0, le=1)]
    check_every: PositiveInt
    seed: NonNegativeInt

    @model_validator(mode="after")
    def _some_of_both(self) -> "Teach":
        mixed = round(self.mix * self.sequences)
        if mixed == self.sequences or (self.mix and not mixed):
            left = "of the text" if mixed else "of the training text"
            raise ValueError(f"`mix` of {self.mix:g} leaves no sequence {left} among {self.sequences} a step")
        return self
