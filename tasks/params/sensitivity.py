"""Section `sensitivity`: how the sensitivity of blocks or layers is measured."""

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, model_validator

from tasks.params.base import Section


def _distinct(widths: list[int]) -> list[int]:
    if len(set(widths)) < len(widths):
        raise ValueError("each width once")
    return widths


class Sensitivity(Section):
    section: ClassVar[str] = "sensitivity"

    method: Literal["pmpq", "cmpq", "tdmpq", "noise", "measured", "none"]
    per: Literal["block", "group", "layer"]
    sparsity: Annotated[float, Field(gt=0, lt=1)]
    similarity: Literal["cca", "svcca", "pwcca", "cka"]
    components: PositiveInt
    widths: Annotated[list[Annotated[int, Field(ge=2, le=8)]], Field(min_length=1), AfterValidator(_distinct)]
    group_size: PositiveInt
    rounding: Literal["nearest", "gptq"]
    around: Annotated[int, Field(ge=2, le=8)] | None
    curvature: Literal["diagonal", "outputs"]
    noise: PositiveFloat
    sequences: PositiveInt
    length: Annotated[int, Field(ge=2)]
    outlier_threshold: PositiveFloat

    @model_validator(mode="after")
    def _is_tried(self) -> "Sensitivity":
        if self.around is not None and self.around not in self.widths:
            raise ValueError(f"around: {self.around} is not among the widths {self.widths}")
        return self
