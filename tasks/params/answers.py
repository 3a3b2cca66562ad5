"""Section `answers`: prompts that the model itself answers."""

from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt

from tasks.params.base import Section
from tasks.params.corpora import Frame
from tasks.params.model import Sha256, Source


class Prompts(BaseModel):
    """A file of prompts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: Source
    sha256: Sha256 | None


class Answers(Section):
    section: ClassVar[str] = "answers"

    prompts: list[Prompts]
    count: PositiveInt
    frame: Frame
    tokens: PositiveInt
    temperature: PositiveFloat
    top_p: Annotated[float, Field(gt=0, le=1)]
    seed: NonNegativeInt
