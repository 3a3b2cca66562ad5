"""Sequences of which some tokens count: answers behind their questions, or all of a text."""

from typing import NamedTuple

import torch
from torch import Tensor


class Samples(NamedTuple):
    """Rows of tokens; a row that is shorter than the longest is filled up on the right.

    Attributes:
        ids: int64 [N, T].
        answer: bool [N, T], the tokens that a loss or a figure counts. Never the first of a row, before which the
            model has seen nothing, nor what fills a row up; a prompt is what comes before the first.
    """

    ids: Tensor
    answer: Tensor

    def to(self, device: torch.device) -> "Samples":
        return Samples(self.ids.to(device), self.answer.to(device))

    def take(self, rows: Tensor) -> "Samples":
        """The rows of these numbers, int64 [n]."""
        return Samples(self.ids[rows], self.answer[rows])

    def trimmed(self) -> "Samples":
        """Without the columns in which no row has an answer any more, which fill rows up."""
        length = int(self.answer.any(0).nonzero().max()) + 1 if self.answer.any() else self.ids.shape[1]
        return Samples(self.ids[:, :length], self.answer[:, :length])

    def prompts(self) -> Tensor:
        """Tokens before each row's answer, int64 [N]."""
        return self.answer.int().argmax(1)


def whole_text(ids: Tensor, prompt: int = 1) -> Samples:
    """Text without questions, ids int64 [N, T]: its first `prompt` tokens are a row's prompt, the rest its answer."""
    answer = torch.ones_like(ids, dtype=torch.bool)
    answer[:, :prompt] = False
    return Samples(ids, answer)


def padded(prompts: list[list[int]], answers: list[list[int]], length: int, filler: int) -> Samples:
    """Rows of a prompt and its answer, cut to at most `length` tokens.

    Args:
        prompts, answers: token ids, as many of the one as of the other; no prompt is empty.
        filler: what rows are filled up with on the right, a token of the vocabulary.
    """
    ids = torch.full((len(prompts), length), filler, dtype=torch.int64)
    answer = torch.zeros(len(prompts), length, dtype=torch.bool)
    for row, (prompt, own) in enumerate(zip(prompts, answers, strict=True)):
        tokens = (prompt + own)[:length]
        ids[row, : len(tokens)] = torch.tensor(tokens)
        answer[row, len(prompt) : len(tokens)] = True
    return Samples(ids, answer)
