"""Section `corpora`: the texts, each role a slice of one of them."""

from typing import Annotated, ClassVar, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, field_validator

from tasks.params.base import Section
from tasks.params.model import Sha256, Source


class Slice(NamedTuple):
    start: int
    stop: int | None


class Text(BaseModel):
    """One text and the tokens of it that a role gets."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: Source
    sha256: Sha256 | None
    format: Literal["text", "articles"]
    tokens: Slice

    @field_validator("tokens")
    @classmethod
    def _forwards(cls, tokens: Slice) -> Slice:
        if tokens.start < 0 or (tokens.stop is not None and tokens.stop <= tokens.start):
            raise ValueError("must be [from, to] with 0 <= from < to, or [from, null]")
        return tokens


class Corpora(Section):
    section: ClassVar[str] = "corpora"

    calibration: Text
    training: Text
    retained: Text
    forget: Text
    control: Text
    evaluation: Annotated[dict[Annotated[str, Field(pattern=r"^[a-z0-9_-]+$")], Text], Field(min_length=1)]

    def roles(self) -> dict[str, Text]:
        """Every text by its path below data/corpora, without the ending."""
        single = {name: getattr(self, name) for name in type(self).model_fields if name != "evaluation"}
        return single | {f"evaluation/{name}": text for name, text in self.evaluation.items()}
