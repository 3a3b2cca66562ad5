"""Section `sensitivity`: how each block's sensitivity is measured."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from tasks.params.base import Section


class Sensitivity(Section):
    section: ClassVar[str] = "sensitivity"

    method: Literal["pmpq", "none"]
    sparsity: Annotated[float, Field(gt=0, lt=1)]
    sequences: PositiveInt
    length: Annotated[int, Field(ge=2)]
    outlier_threshold: PositiveFloat
