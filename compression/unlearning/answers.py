"""Other answers to the prompts that are to be forgotten."""

import torch

from compression.training.samples import Samples, padded

FILLER = 0  # a token of every vocabulary; no loss looks at it


def answers_of(samples: Samples) -> list[list[int]]:
    """The answer tokens of every row that has any."""
    rows = zip(samples.ids, samples.answer, strict=True)
    return [ids[answer].tolist() for ids, answer in rows if answer.any()]


def answered_anew(
    samples: Samples, answers: list[list[int]], generator: torch.Generator, length: int | None = None
) -> Samples:
    """Every row's prompt with an answer drawn at random. A row without an answer keeps none.

    Args:
        answers: to draw from, with replacement.
        length: to which rows are cut; None: each has room for its answer.
    """
    drawn = torch.randint(len(answers), (len(samples.ids),), generator=generator).tolist()
    prompts = [ids[:count].tolist() for ids, count in zip(samples.ids, samples.prompts().tolist(), strict=True)]
    has_one = samples.answer.any(1).tolist()
    prompts = [prompt or [FILLER] for prompt in prompts]
    own = [answers[number] if has else [] for number, has in zip(drawn, has_one, strict=True)]
    longest = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, own, strict=True))
    anew = padded(prompts, own, length or longest, FILLER)
    return Samples(anew.ids.to(samples.ids.device), anew.answer.to(samples.ids.device))
