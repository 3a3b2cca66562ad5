"""Tokens of a role, cut into equal sequences."""

from pathlib import Path

import torch
from torch import Tensor

from compression.core.errors import Problem
from compression.core.files import read_tensors
from tasks.core.paths import DATA

CORPORA = DATA / "corpora"


def corpus_file(role: str) -> Path:
    """Where stage corpus puts a role's tokens."""
    return CORPORA / f"{role}.safetensors"


def read_sequences(role: str, count: int | None, length: int, where: str) -> Tensor:
    """The first `count` consecutive sequences of a role (all there are if None).

    Returns:
        int64 [count, length].

    Raises:
        Problem: there are fewer tokens than asked for; `where` names the key that asks.
    """
    tokens = read_tensors(corpus_file(role))["tokens"]
    there = len(tokens) // length
    if (count or 1) > there:
        raise Problem(
            where,
            f"{count or 1} sequences of {length} tokens asked of `{role}`, which has {len(tokens):,} tokens",
            f"at most {there} of {length}; or a longer text in corpora.{role.replace('/', '.')}",
        )
    count = count or there
    return tokens[: count * length].view(count, length).to(torch.int64)
