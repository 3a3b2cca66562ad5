"""Section `speed`: what is timed."""

from typing import ClassVar

from pydantic import PositiveInt

from tasks.params.base import Section


class Speed(Section):
    section: ClassVar[str] = "speed"

    prefill: PositiveInt
    decode: PositiveInt
    repeats: PositiveInt
