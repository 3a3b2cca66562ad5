"""Section `corpora`: the texts, each role a slice of one of them."""

from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, WrapValidator, field_validator

from tasks.params.base import PARAMS, Section
from tasks.params.model import Sha256, Source

TEXTS = ("text", "articles")
PAIRS = ("pairs", "articles_as_questions")
Frame = Literal["chat", "question_answer", "none"]  # how a prompt is put to the model


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
    unit: ClassVar[str] = "tokens"

    @field_validator("tokens")
    @classmethod
    def _forwards(cls, tokens: Slice) -> Slice:
        return _forwards(tokens)

    @property
    def slice(self) -> Slice:
        """What of the source the role gets."""
        return self.tokens


class Pairs(BaseModel):
    """Questions and answers, and the rows of them that a role gets."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: Source
    sha256: Sha256 | None
    format: Literal["pairs", "articles_as_questions"]
    frame: Frame
    rows: Slice
    unit: ClassVar[str] = "rows"

    @field_validator("rows")
    @classmethod
    def _forwards(cls, rows: Slice) -> Slice:
        return _forwards(rows)

    @property
    def slice(self) -> Slice:
        """What of the source the role gets."""
        return self.rows


def _forwards(part: Slice) -> Slice:
    if part.start < 0 or (part.stop is not None and part.stop <= part.start):
        raise ValueError("must be [from, to] with 0 <= from < to, or [from, null]")
    return part


def _by_format(value: Any, validate: Any) -> Any:
    """One kind is tried, so that a fault is told once and in the words of that kind."""
    if not isinstance(value, dict):
        return validate(value)
    form = value.get("format", TEXTS[0])
    if form not in (*TEXTS, *PAIRS):
        raise ValueError(f"format is `{form}`; valid: {', '.join((*TEXTS, *PAIRS))}")
    return (Pairs if form in PAIRS else Text).model_validate(value)


TextOrPairs = Annotated[Pairs | Text, WrapValidator(_by_format)]


class Corpora(Section):
    section: ClassVar[str] = "corpora"

    calibration: Text
    training: TextOrPairs
    retained: TextOrPairs
    forget: TextOrPairs
    neighbours: TextOrPairs | None
    control: TextOrPairs
    evaluation: Annotated[dict[Annotated[str, Field(pattern=r"^[a-z0-9_-]+$")], Text], Field(min_length=1)]

    def roles(self) -> dict[str, Text | Pairs]:
        """Every text that is named, by its path below data/corpora, without the ending."""
        single = {name: getattr(self, name) for name in type(self).model_fields if name != "evaluation"}
        single = {name: text for name, text in single.items() if text is not None}
        return single | {f"evaluation/{name}": text for name, text in self.evaluation.items()}


def key(role: str, *within: str) -> str:
    """A role's place in params.yaml as messages name it, or that of something within it."""
    return f"{PARAMS}: " + ".".join(["corpora", dotted(role), *within])


def dotted(role: str) -> str:
    """A role as params.yaml nests it."""
    return role.replace("/", ".")
