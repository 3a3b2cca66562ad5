"""Section `attack`: what is tried to bring back what was unlearned."""

from typing import Annotated, ClassVar

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from tasks.params.base import Section


class Attack(Section):
    section: ClassVar[str] = "attack"

    relearn: list[PositiveInt]
    samples: PositiveInt
    sequences: PositiveInt
    rank: PositiveInt
    learning_rate: PositiveFloat
    requantize: list[Annotated[int, Field(ge=2, le=8)]]
    group_size: PositiveInt
    prune: list[Annotated[float, Field(gt=0, lt=1)]]
    windows: PositiveInt
    length: Annotated[int, Field(ge=2)]
    prompt: PositiveInt
    seed: NonNegativeInt
