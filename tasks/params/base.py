"""Reads one section of params.yaml into its model, and says in plain words what is wrong with it."""

import difflib
import re
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from compression.core.errors import Problem

PARAMS = Path("params.yaml")
TYPE = re.compile(r"literal\[.*\]|constrained-\w+|function-.*|int|float|str|bool")  # a type, as pydantic names it


class Section(BaseModel):
    """A section of params.yaml. No key has a default: what a run did is all in the file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
    section: ClassVar[str]


S = TypeVar("S", bound=Section)


def load(path: Path = PARAMS) -> dict[str, Any]:
    """The whole file as a dictionary.

    Raises:
        Problem: the file is missing, or is not a YAML mapping.
    """
    try:
        # YAML 1.2, as DVC writes it; by YAML 1.1 a pattern of 2:4 would be the number 124, and 1e-7 a text.
        document = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Problem(str(path), "there is no such file here", "run from the project's root") from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise Problem(str(path), f"not valid YAML: {error}") from None
    if not isinstance(document, dict):
        raise Problem(str(path), "not a mapping of sections")
    return document


def read(model: type[S], document: dict[str, Any] | None = None) -> S:
    """The section that `model` describes, validated.

    Raises:
        Problem: a missing section, an unknown or missing key, or a value out of range; all of a section's
            faults are in the one message, a line each.
    """
    document = load() if document is None else document
    if model.section not in document:
        raise Problem(str(PARAMS), f"section `{model.section}` is missing")
    try:
        return model.model_validate(document[model.section])
    except ValidationError as error:
        lines = [_sentence(model, fault) for fault in error.errors()]
        raise Problem(str(PARAMS), lines[0] if len(lines) == 1 else "\n  ".join(["", *lines])) from None


def nearest(word: str, valid: list[str]) -> str:
    """A hint: the closest valid word, or all of them."""
    close = difflib.get_close_matches(word, valid, n=1, cutoff=0.5)
    return f"did you mean `{close[0]}`?" if close else "valid: " + ", ".join(sorted(valid))


def _sentence(model: type[BaseModel], fault: Any) -> str:
    # Of a key that may be of several types, pydantic adds the name of the type.
    steps = [str(step) for step in fault["loc"] if not TYPE.fullmatch(str(step))]
    path = ".".join([model.section if issubclass(model, Section) else "", *steps])
    if fault["type"] == "extra_forbidden":
        return f"unknown key `{path}`; {nearest(str(fault['loc'][-1]), _keys_beside(model, fault['loc']))}"
    if fault["type"] == "missing":
        return f"key `{path}` is missing"
    message = str(fault["msg"]).removeprefix("Value error, ")
    return f"`{path}` is {fault['input']!r}: {message[:1].lower()}{message[1:]}"


def _keys_beside(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """The valid keys at the place where an unknown one was found."""
    for step in loc[:-1]:
        field = model.model_fields.get(str(step))
        inner = field.annotation if field else None
        for kind in (inner, *get_args(inner)):  # of a mapping, what it holds
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                model = kind
    return list(model.model_fields)
