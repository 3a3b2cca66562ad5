"""Section `quantize`: which grid, and who gets the finer one."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt

from tasks.params.base import Section


class Quantize(Section):
    section: ClassVar[str] = "quantize"

    method: Literal["rtn", "given", "none"]
    group_size: PositiveInt
    bits: Literal[4, 8]
    sensitive_bits: Literal[4, 8]
    sensitive_share: Annotated[float, Field(ge=0, le=1)]
    by: Literal["pmpq", "outlier_ratio"]
