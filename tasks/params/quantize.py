"""Section `quantize`: which grid, how weights come to lie on it, and how many bits each layer gets."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from tasks.params.base import Section

Bits = Annotated[int, Field(ge=2, le=8)]
Width = Bits | Literal[16]


class Tune(BaseModel):
    """How the scales of the grid learn once codes are chosen."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    steps: NonNegativeInt
    sequences: PositiveInt
    length: Annotated[int, Field(ge=2)]
    distillation: Annotated[float, Field(ge=0, le=1)]
    learning_rate: PositiveFloat
    warmup: Annotated[float, Field(ge=0, le=1)]
    clip: PositiveFloat
    held_out: NonNegativeInt
    check_every: PositiveInt
    seed: NonNegativeInt


class Quantize(Section):
    section: ClassVar[str] = "quantize"

    method: Literal["rtn", "gptq", "given", "none"]
    group_size: PositiveInt | Literal["row", "tensor"]
    symmetric: bool
    clip: bool
    order: Literal["natural", "activation"]
    damping: PositiveFloat
    sequences: PositiveInt
    length: Annotated[int, Field(ge=2)]
    embeddings: Bits | None
    plan: Literal["uniform", "percentile", "kmeans", "budget", "ceiling"]
    bits: Bits
    by: Literal["pmpq", "cmpq", "tdmpq", "noise", "measured", "outlier_ratio"]
    widths: Annotated[list[Width], Field(min_length=1)]
    shares: list[Annotated[float, Field(ge=0, le=1)]]
    average_bits: PositiveFloat
    perplexity_ceiling: Annotated[float, Field(gt=1)]
    tune: Tune

    @model_validator(mode="after")
    def _widths_are_sound(self) -> Self:
        if len(set(self.widths)) < len(self.widths):
            raise ValueError("`widths` has a number twice")
        if self.plan == "percentile" and (len(self.shares) != len(self.widths) or abs(sum(self.shares) - 1) > 1e-6):
            raise ValueError("`shares` must be one for each of `widths`, and 1 together")
        return self

    @property
    def ranks(self) -> bool:
        """Whether the sensitivity table is looked at."""
        return self.method != "none" and self.plan != "uniform"

    @property
    def tunes(self) -> bool:
        """Whether scales learn."""
        return self.method != "none" and self.tune.steps > 0
