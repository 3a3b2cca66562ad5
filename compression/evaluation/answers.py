"""What a model says to prompts: is the true answer in it, is it language, is it an answer at all?"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from compression.evaluation.fluency import Answer, Bounds, distinct_share, is_gibberish, refuses
from compression.evaluation.overlap import rouge_l
from compression.training.samples import Samples

Decode = Callable[[list[int]], str]  # token ids -> text, special tokens left out

OVERLAPPING = 4  # pieces of real text begin so many times as often as they would end to end


def answers(samples: Samples, losses: Tensor, decode: Decode) -> list[Answer]:
    """The answer of each row, with its mean loss; of an empty answer NaN.

    Args:
        losses: [N, T - 1] in nats, of every predicted token.
    """
    return [
        Answer(decode(row[counted].tolist()), row[counted].tolist(), float(loss[counted[1:]].double().mean()))
        for row, counted, loss in zip(samples.ids, samples.answer, losses, strict=True)
    ]


def pieces(samples: Samples, losses: Tensor, tokens: int, decode: Decode) -> list[Answer]:
    """Real answers cut into pieces of so many tokens that overlap; a shorter answer is one piece.

    Each is as a generated answer is: some tokens behind what comes before them.
    """
    found = []
    for row, counted, loss in zip(samples.ids, samples.answer, losses, strict=True):
        places = counted.nonzero()[:, 0]
        for start in range(0, max(len(places) - tokens, 0) + 1, max(tokens // OVERLAPPING, 1)):
            own = places[start : start + tokens]
            ids = row[own].tolist()
            found.append(Answer(decode(ids), ids, float(loss[own - 1].double().mean())))
    return found


def true_answers(samples: Samples, decode: Decode, tokens: int | None = None) -> list[str]:
    """Each row's answer as text, or the first `tokens` tokens of it."""
    return [decode(row[counted][:tokens].tolist()) for row, counted in zip(samples.ids, samples.answer, strict=True)]


def prompts(samples: Samples) -> list[list[int]]:
    """Each row's tokens before its answer."""
    return [row[:stop].tolist() for row, stop in zip(samples.ids, samples.prompts().tolist(), strict=True)]


def answer_figures(said: Sequence[Answer], wanted: Sequence[str], bounds: Mapping[int, Bounds]) -> dict[str, float]:
    """Shares and means over what was said, at least one answer.

    Args:
        wanted: the true answers.
        bounds: of language, by length.

    Returns:
        prompts, how many; rouge_l_recall, rouge_l_f1 against the true answers; distinct_1, _2, _3; gibberish, empty and
        refused, shares of the answers; answered, the share of those that are none of the three.
    """
    overlap = [rouge_l(answer.text, reference) for answer, reference in zip(said, wanted, strict=True)]
    gibberish = [is_gibberish(answer, bounds) for answer in said]
    refused = [refuses(answer.text) for answer in said]
    return {
        "prompts": len(said),
        "rouge_l_recall": _mean([one.recall for one in overlap]),
        "rouge_l_f1": _mean([one.f1 for one in overlap]),
        **{f"distinct_{size}": _mean([distinct_share(answer.tokens, size) for answer in said]) for size in (1, 2, 3)},
        "gibberish": _mean(gibberish),
        "empty": _mean([not answer.text.strip() for answer in said]),
        "refused": _mean(refused),
        "answered": _mean([not (bad or declined) for bad, declined in zip(gibberish, refused, strict=True)]),
    }


def _mean(values: Sequence[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).mean())
