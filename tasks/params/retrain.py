"""Section `retrain`: which parameters learn, and how."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from tasks.params.base import Section


class Retrain(Section):
    section: ClassVar[str] = "retrain"

    method: Literal["subset", "mask_lora", "scale_lora", "lora_prune", "lora", "full", "none"]
    objective: Literal["next_token", "block", "half_block"]
    biases: bool
    norms: bool
    head: bool
    embeddings: bool
    rank: PositiveInt
    alpha: PositiveFloat
    dropout: Annotated[float, Field(ge=0, lt=1)]
    targets: list[str]
    start: Literal["broken", "paper"]
    steps: PositiveInt
    sequences: PositiveInt
    accumulation: PositiveInt
    processes: PositiveInt
    checkpointing: bool
    distillation: Annotated[float, Field(ge=0, le=1)]
    length: Annotated[int, Field(ge=2)]
    learning_rate: PositiveFloat
    warmup: Annotated[float, Field(ge=0, le=1)]
    clip: PositiveFloat
    held_out: NonNegativeInt
    check_every: PositiveInt
    patience: NonNegativeInt
    search: list[PositiveFloat]
    search_steps: PositiveInt
    seed: NonNegativeInt
