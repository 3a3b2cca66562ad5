"""Section `evaluate`: how much text each checkpoint is judged on."""

from typing import Annotated, ClassVar

from pydantic import Field, PositiveInt

from tasks.params.base import Section


class Evaluate(Section):
    section: ClassVar[str] = "evaluate"

    windows: PositiveInt
    length: Annotated[int, Field(ge=2)]
    forget_windows: PositiveInt
    forget_length: Annotated[int, Field(ge=2)]
