"""Section `compute`: where and how precisely to calculate."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from tasks.params.base import Section


class Compute(Section):
    section: ClassVar[str] = "compute"

    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")]
    dtype: Literal["auto", "bfloat16", "float32"]
    threads: Annotated[int, Field(ge=1, le=1024)]
