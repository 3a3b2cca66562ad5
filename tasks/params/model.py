"""Section `model`: which model to compress."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from tasks.params.base import Section

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Source = Annotated[str, Field(pattern=r"^(pypi|hf|file)://.+")]


class Model(Section):
    section: ClassVar[str] = "model"

    source: Source
    sha256: Sha256 | None
    dtype: Literal["source", "bfloat16", "float16", "float32"]
    licence: str
