"""Section `classifier`: the texts from which it learns what is harmful, and the encoder that reads them."""

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from tasks.params.base import Section
from tasks.params.model import Sha256, Source


class Part(BaseModel):
    """A file of texts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: Source
    sha256: Sha256 | None


class Harmless(Part):
    format: Literal["text", "articles"]


class EncoderFiles(BaseModel):
    """An encoder: the address of a folder, and the files that are taken from it with their hashes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: Source
    files: dict[str, Sha256 | None]

    @field_validator("files")
    @classmethod
    def _whole(cls, files: dict[str, str | None]) -> dict[str, str | None]:
        needed = {"config.json", "model.safetensors", "tokenizer.json"}
        if not needed <= files.keys():
            raise ValueError("must name at least " + ", ".join(sorted(needed)))
        return files


class Classifier(Section):
    section: ClassVar[str] = "classifier"

    encoder: EncoderFiles
    harmful: Annotated[list[Part], Field(min_length=1)]
    harmless: Annotated[list[Harmless], Field(min_length=1)]
    sentences: PositiveInt
    requests: list[str]
    answers: list[str]
    refusals: list[str]
    advice: list[str]
    joined: PositiveInt
    held_out: Annotated[float, Field(gt=0, lt=1)]
    penalty: PositiveFloat
    seed: NonNegativeInt

    @field_validator("requests")
    @classmethod
    def _with_a_place(cls, requests: list[str]) -> list[str]:
        if any(form.count("{}") != 1 for form in requests):
            raise ValueError("each form must have one {}, where the topic goes")
        return requests
