"""Section `evaluate`: how much text each checkpoint is judged on."""

from typing import Annotated, ClassVar

from pydantic import Field, NonNegativeInt, PositiveInt, ValidationInfo, field_validator

from tasks.params.base import Section


class Evaluate(Section):
    section: ClassVar[str] = "evaluate"

    windows: PositiveInt
    length: Annotated[int, Field(ge=2)]
    forget_windows: PositiveInt
    forget_length: Annotated[int, Field(ge=2)]
    prompt: PositiveInt
    answers: NonNegativeInt
    harm_answers: NonNegativeInt
    answer_tokens: PositiveInt

    @field_validator("prompt")
    @classmethod
    def _leaves_an_answer(cls, prompt: int, info: ValidationInfo) -> int:
        if prompt >= info.data.get("forget_length", prompt + 1):
            raise ValueError("must be less than forget_length, or no answer is left")
        return prompt

    @field_validator("answers")
    @classmethod
    def _are_there(cls, answers: int, info: ValidationInfo) -> int:
        if answers > info.data.get("forget_windows", answers):
            raise ValueError("must be at most forget_windows")
        return answers
