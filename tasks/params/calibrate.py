"""Section `calibrate`: how much text the activation statistics see."""

from typing import ClassVar

from pydantic import PositiveInt

from tasks.params.base import Section


class Calibrate(Section):
    section: ClassVar[str] = "calibrate"

    sequences: PositiveInt
    length: PositiveInt
