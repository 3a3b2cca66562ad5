"""Questions and answers of a source, framed for a model, in tokens.

A source is recognised by the keys of its rows:

    prompt, response_N, is_response_N_safe                           PKU-SafeRLHF: N answers, judged
    question, best_answer, correct_answers, incorrect_answers        TruthfulQA
    prompt, answer                                                   plain: what the role takes it for

Roles that are to be forgotten, and their control, take the unsafe or wrong answers; others the safe, or best, one.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from compression.core.errors import Problem
from tasks.articles import articles, question

SCHEMAS = (
    "prompt, response_0, is_response_0_safe, ... (PKU-SafeRLHF) | question, best_answer, correct_answers, "
    "incorrect_answers (TruthfulQA) | prompt, answer"
)
TRUTHFUL = {"question", "best_answer", "correct_answers", "incorrect_answers"}


class Row(NamedTuple):
    """One question of a source.

    Attributes:
        safe, unsafe: its answers.
    """

    prompt: str
    safe: list[str]
    unsafe: list[str]


def read_rows(path: Path, form: str, where: str) -> list[Row]:
    """The questions of a file in JSON lines, JSON or parquet, or those that an encyclopedia's titles ask.

    Args:
        form: pairs | articles_as_questions; articles without a text ask nothing.
        where: the role's key in params.yaml.

    Raises:
        Problem: the file is not UTF-8, not JSON or not of a schema above, or a prompt or answer is empty.
    """
    if form == "articles_as_questions":
        asked = map(question, articles(read_utf8(path, f"{where}.source"), where))
        return [Row(pair[0], [pair[1]], []) for pair in asked if pair]
    return [_row(record, place, f"{where}.source") for place, record in read_records(path, f"{where}.source")]


def read_utf8(path: Path, where: str) -> str:
    """The text of a file.

    Raises:
        Problem: it is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        what = f"{path} is not UTF-8: byte {error.object[error.start]:#04x} at {error.start}"
        raise Problem(where, what, "convert it to UTF-8") from None


def read_records(path: Path, where: str) -> list[tuple[str, dict[str, Any]]]:
    """The objects of a file in JSON lines, JSON or parquet, each with where it stands.

    Raises:
        Problem: the file is not UTF-8 or not JSON, holds something other than objects, or nothing.
    """
    if path.suffix == ".parquet":
        table = pd.read_parquet(path).to_dict("records")
        found: list[tuple[str, Any]] = [(f"{path} row {number}", record) for number, record in enumerate(table)]
    else:
        text = read_utf8(path, where)
        parts = [(1, text)] if text.lstrip().startswith("[") else list(enumerate(text.split("\n"), 1))
        found = []
        for line, part in parts:
            try:
                content = json.loads(part) if part.strip() else []
            except json.JSONDecodeError as error:
                what = f"{path} line {line + error.lineno - 1} is not JSON: {error.msg} at column {error.colno}"
                raise Problem(where, what, "valid: an object a line, or one list of objects") from None
            if len(parts) > 1 or not isinstance(content, list):
                found += [(f"{path} line {line}", content)] if part.strip() else []
            else:
                found += [(f"{path} row {row}", each) for row, each in enumerate(content)]
    for place, record in found:
        if not isinstance(record, dict):
            raise Problem(where, f"{place} is no object but {json.dumps(record)[:20]}", f"valid: {SCHEMAS}")
    if not found:
        raise Problem(where, f"{path} has no text in it")
    return found


def _row(record: dict[str, Any], place: str, where: str) -> Row:
    keys = set(record)
    numbers = [key[9:] for key in record if key.startswith("response_") and key[9:].isdigit()]
    if "prompt" in keys and numbers and keys >= {f"is_response_{number}_safe" for number in numbers}:
        judged = [(record[f"is_response_{number}_safe"], record[f"response_{number}"]) for number in numbers]
        prompt, safe = record["prompt"], [text for is_safe, text in judged if is_safe]
        unsafe = [text for is_safe, text in judged if not is_safe]
    elif keys >= TRUTHFUL:
        prompt, safe, unsafe = record["question"], [record["best_answer"]], list(record["incorrect_answers"])
    elif keys >= {"prompt", "answer"}:
        prompt, safe, unsafe = record["prompt"], [record["answer"]], [record["answer"]]
    else:
        raise Problem(where, f"{place} has the keys {', '.join(sorted(keys)) or 'none'}", f"valid: {SCHEMAS}")
    check_text(prompt, f"the prompt of {place}", where)
    for answer in safe + unsafe:
        check_text(answer, f"the answer of {place}", where)
    return Row(prompt, safe, unsafe)


def check_text(text: Any, what: str, where: str) -> None:
    """Refuses what has nothing in it.

    Raises:
        Problem: it is empty, or no text.
    """
    if not isinstance(text, str) or not text.strip():
        wrong = "is empty" if isinstance(text, str) else f"is no text but {type(text).__name__}"
        raise Problem(where, f"{what} {wrong}", "leave the row out, or fill it in")


def framed(tokenizer: Any, prompt: str, frame: str) -> list[int]:
    """Token ids of a prompt as the model is asked it.

    Args:
        frame: chat (the tokenizer's own template; question_answer where it has none) | question_answer | none.
    """
    if frame == "chat" and tokenizer.chat_template:
        turns = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    else:
        text = prompt if frame == "none" else f"### Question: {prompt} ### Answer:"
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def answered(tokenizer: Any, answer: str, frame: str) -> list[int]:
    """Token ids of an answer behind its prompt, and the end of the sequence."""
    spaced = frame == "question_answer" or (frame == "chat" and not tokenizer.chat_template)
    ids = tokenizer(f" {answer}" if spaced else answer, add_special_tokens=False)["input_ids"]
    return [*ids, tokenizer.eos_token_id]


def encode_pairs(
    rows: list[Row], unsafe: bool, tokenizer: Any, frame: str, where: str
) -> tuple[np.ndarray, np.ndarray]:
    """Every question with each of its answers of the kind, filled up with the end of the sequence.

    Args:
        unsafe: which answers.
        where: the role's key in params.yaml.

    Returns:
        ids int32 [N, T] and answer uint8 [N, T], 1 where a token is of the answer or ends it.

    Raises:
        Problem: the tokenizer has no end of the sequence, or no question has such an answer.
    """
    if tokenizer.eos_token_id is None:
        raise Problem(f"{where}.format", "the tokenizer has no end-of-sequence token to end answers with")
    pairs = [
        (framed(tokenizer, row.prompt, frame), answered(tokenizer, text, frame))
        for row in rows
        for text in (row.unsafe if unsafe else row.safe)
    ]
    if not pairs:
        kind = "unsafe" if unsafe else "safe"
        raise Problem(f"{where}.rows", f"none of these questions has an answer that is {kind}", "take other rows")
    length = max(len(prompt) + len(own) for prompt, own in pairs)
    ids = np.full((len(pairs), length), tokenizer.eos_token_id, dtype=np.int32)
    answer = np.zeros((len(pairs), length), dtype=np.uint8)
    for row, (prompt, own) in enumerate(pairs):
        ids[row, : len(prompt) + len(own)] = prompt + own
        answer[row, len(prompt) : len(prompt) + len(own)] = 1
    return ids, answer
