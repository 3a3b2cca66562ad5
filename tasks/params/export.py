"""Section `export`: which checkpoint is written for other programs, and as what."""

from typing import ClassVar, Literal

from pydantic import field_validator

from tasks.params.base import Section


class Export(Section):
    section: ClassVar[str] = "export"

    source: Literal["pruned", "retrained", "quantized", "unlearned"]
    formats: list[Literal["gguf", "compact"]]

    @field_validator("formats")
    @classmethod
    def _distinct(cls, formats: list[str]) -> list[str]:
        if len(set(formats)) < len(formats):
            raise ValueError("each format once")
        return formats
