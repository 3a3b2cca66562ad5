"""Tokens of a role: cut into equal sequences, or questions with their answers.

Stage corpus stores plain text as `tokens` [n], and pairs as `ids` [N, T] with `answer` [N, T], filled up on the right.
"""

from pathlib import Path

import torch
from torch import Tensor

from compression.core.errors import Problem
from compression.core.files import read_tensors
from compression.training.samples import Samples, whole_text
from tasks.core.paths import DATA

CORPORA = DATA / "corpora"


def corpus_file(role: str) -> Path:
    """Where stage corpus puts a role's tokens."""
    return CORPORA / f"{role}.safetensors"


def read_sequences(role: str, count: int | None, length: int, where: str) -> Tensor:
    """The first `count` consecutive sequences of a role (all there are if None); of pairs, those of all rows in a line.

    Returns:
        int64 [count, length].

    Raises:
        Problem: there are fewer tokens than asked for; `where` names the key that asks.
    """
    stored = read_tensors(corpus_file(role))
    tokens = stored["tokens"] if "tokens" in stored else _in_a_line(_pairs(stored))
    there = len(tokens) // length
    if (count or 1) > there:
        raise Problem(
            where,
            f"{count or 1} sequences of {length} tokens asked of `{role}`, which has {len(tokens):,} tokens",
            f"at most {there} of {length}; or a longer text in {_key(role)}",
        )
    count = count or there
    return tokens[: count * length].view(count, length).to(torch.int64)


def is_empty(role: str) -> bool:
    """Whether params.yaml leaves the role out."""
    stored = read_tensors(corpus_file(role))
    return "tokens" in stored and not len(stored["tokens"])


def read_samples(role: str, count: int | None, length: int, where: str, prompt: int = 1) -> Samples:
    """The first `count` samples of a role (all there are if None), each of `length` tokens.

    Plain text is cut into sequences, of which the first `prompt` tokens are the prompt. Pairs are cut to `length` or
    filled up; those of whose answer nothing would be left are passed over.

    Raises:
        Problem: there are fewer than asked for, or plain text would have no answer; `where` names the key that asks.
    """
    stored = read_tensors(corpus_file(role))
    if "tokens" in stored:
        if not 0 < prompt < length:
            what = f"a prompt of {prompt} tokens in sequences of {length} leaves no answer"
            raise Problem(where, what, f"valid: a prompt of 1 to {length - 1} tokens")
        return whole_text(read_sequences(role, count, length, where), prompt)
    samples = _pairs(stored)
    missing = max(length - samples.ids.shape[1], 0)
    filler = samples.ids[:, -1:].expand(-1, missing)  # every stored row ends with the token that ends an answer
    ids = torch.cat([samples.ids, filler], 1)[:, :length]
    answer = torch.nn.functional.pad(samples.answer, (0, missing))[:, :length]
    rows = answer.any(1).nonzero()[:, 0]
    if (count or 1) > len(rows):
        raise Problem(
            where,
            f"{count or 1} answers within {length} tokens asked of `{role}`, which has {len(rows)} of them",
            f"at most {len(rows)}, or longer ones; or more rows in {_key(role)}",
        )
    return Samples(ids[rows[:count]], answer[rows[:count]])


def _pairs(stored: dict[str, Tensor]) -> Samples:
    return Samples(stored["ids"].to(torch.int64), stored["answer"].bool())


def _in_a_line(samples: Samples) -> Tensor:
    """Tokens int64 [n] of all rows, each up to its answer's end."""
    behind = samples.answer.flip(1).int().cumsum(1).flip(1)  # answer tokens from here on
    return samples.ids[behind > 0]


def _key(role: str) -> str:
    return f"corpora.{role.replace('/', '.')}"
