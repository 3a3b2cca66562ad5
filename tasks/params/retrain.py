"""Section `retrain`: which parameters learn, and how."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from tasks.params.base import Section


class Retrain(Section):
    section: ClassVar[str] = "retrain"

    method: Literal["subset", "mask_lora", "scale_lora", "lora_prune", "full", "none"]
    biases: bool
    norms: bool
    head: bool
    embeddings: bool
    rank: PositiveInt
    alpha: PositiveFloat
    start: Literal["broken", "paper"]
    steps: PositiveInt
    sequences: PositiveInt
    length: Annotated[int, Field(ge=2)]
    learning_rate: PositiveFloat
    warmup: Annotated[float, Field(ge=0, le=1)]
    clip: PositiveFloat
    seed: NonNegativeInt
