"""Unlearning objectives token by token, each row alone and without anything that fills it up; float64."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compression.training.samples import Samples


class Row(NamedTuple):
    """Tokens up to an answer's end, and the place of the answer's first."""

    tokens: list[int]
    first: int


class Case(NamedTuple):
    """Rows, and models that give logits [T, V] or states [T, d] for the tokens of one."""

    forget: list[Row]
    retain: list[Row]
    anew: list[Row]  # the prompts to be forgotten with other answers
    model: Callable[[list[int]], Tensor]
    start: Callable[[list[int]], Tensor]
    states: Callable[[list[int]], Tensor]
    start_states: Callable[[list[int]], Tensor]


def rows(samples: Samples) -> list[Row]:
    """The rows of samples; one without an answer is a prompt of a token."""
    found = []
    for ids, answer in zip(samples.ids.tolist(), samples.answer.tolist(), strict=True):
        places = [place for place, counts in enumerate(answer) if counts]
        found.append(Row(ids[: places[-1] + 1], places[0]) if places else Row(ids[:1], 1))
    return found


def losses(row: Row, model: Callable[[list[int]], Tensor]) -> list[Tensor]:
    """-log p of each token of the answer."""
    z = model(row.tokens).double()
    return [torch.log(torch.exp(z[t - 1]).sum()) - z[t - 1, row.tokens[t]] for t in range(row.first, len(row.tokens))]


def mean(numbers: list[Tensor]) -> Tensor:
    return sum(numbers, torch.zeros((), dtype=torch.float64)) / max(1, len(numbers))


def total(numbers: list[Tensor]) -> Tensor:
    return sum(numbers, torch.zeros((), dtype=torch.float64))


def nll(every: list[Row], model: Callable[[list[int]], Tensor]) -> Tensor:
    """Mean over all tokens of all answers."""
    return mean([loss for row in every for loss in losses(row, model)])


def nll_by_row(every: list[Row], model: Callable[[list[int]], Tensor]) -> Tensor:
    return mean([mean(own) for row in every if (own := losses(row, model))])


def kl(case: Case) -> Tensor:
    """Mean over the retained answers' tokens of the sum over the vocabulary of p0 log(p0 / p)."""
    found = []
    for row in case.retain:
        p, p0 = (torch.softmax(model(row.tokens).double(), 1) for model in (case.model, case.start))
        for t in range(row.first, len(row.tokens)):
            terms = [p0[t - 1, v] * torch.log(p0[t - 1, v] / p[t - 1, v]) for v in range(p.shape[1])]
            found.append(total(terms))
    return mean(found)


def log_ratio(row: Row, case: Case) -> Tensor:
    """log(p(y | x) / p0(y | x))."""
    return total(losses(row, case.start)) - total(losses(row, case.model))


def log_sigmoid(x: Tensor) -> Tensor:
    return -torch.log(1 + torch.exp(-x))


def gradient_ascent(case: Case, o: dict[str, Any]) -> Tensor:
    return -o["forget_weight"] * nll(case.forget, case.model)


def grad_diff(case: Case, o: dict[str, Any]) -> Tensor:
    return gradient_ascent(case, o) + retained(case, o)


def retained(case: Case, o: dict[str, Any]) -> Tensor:
    weighted: Tensor = o["retain_weight"] * nll(case.retain, case.model)
    return weighted


def llmu(case: Case, o: dict[str, Any]) -> Tensor:
    return (
        -o["forget_weight"] * nll_by_row(case.forget, case.model)
        + o["random_weight"] * nll_by_row(case.anew, case.model)
        + o["retain_weight"] * kl(case)
    )


def npo(case: Case, o: dict[str, Any]) -> Tensor:
    terms = [-2 / o["beta"] * log_sigmoid(-o["beta"] * log_ratio(row, case)) for row in case.forget]
    return o["forget_weight"] * mean(terms) + retained(case, o)


def simnpo(case: Case, o: dict[str, Any]) -> Tensor:
    terms = [
        -2 / o["beta"] * log_sigmoid(o["beta"] * (mean(losses(row, case.model)) - o["delta"])) for row in case.forget
    ]
    return o["forget_weight"] * mean(terms) + retained(case, o)


def dpo(case: Case, o: dict[str, Any]) -> Tensor:
    terms = [
        -2 / o["beta"] * log_sigmoid(o["beta"] * (log_ratio(winner, case) - log_ratio(loser, case)))
        for winner, loser in zip(case.anew, case.forget, strict=True)
    ]
    return o["forget_weight"] * mean(terms) + retained(case, o)


def refuse(case: Case, o: dict[str, Any]) -> Tensor:
    return o["forget_weight"] * nll(case.anew, case.model) + retained(case, o)


def rmu(case: Case, o: dict[str, Any]) -> Tensor:
    steered, kept = [], []
    for row in case.forget:
        h = case.states(row.tokens)
        u = torch.rand(h.shape[1], generator=torch.Generator().manual_seed(o["seed"])).double()
        u = u / (u * u).sum().sqrt()
        for t in range(row.first, len(row.tokens)):
            steered.append(mean([(h[t, i] - o["steering"] * u[i]) ** 2 for i in range(h.shape[1])]))
    for row in case.retain:
        h, h0 = case.states(row.tokens), case.start_states(row.tokens)
        for t in range(row.first, len(row.tokens)):
            kept.append(mean([(h[t, i] - h0[t, i]) ** 2 for i in range(h.shape[1])]))
    return o["forget_weight"] * mean(steered) + o["retain_weight"] * mean(kept)


def undial(case: Case, o: dict[str, Any]) -> Tensor:
    found = []
    for row in case.forget:
        z, z0 = case.model(row.tokens).double(), case.start(row.tokens).double()
        for t in range(row.first, len(row.tokens)):
            wanted = z0[t - 1].clone()
            wanted[row.tokens[t]] -= o["beta"]
            q = torch.exp(wanted) / torch.exp(wanted).sum()
            log_p = z[t - 1] - torch.log(torch.exp(z[t - 1]).sum())
            found.append(-(q * log_p).sum())
    return o["forget_weight"] * mean(found) + retained(case, o)


LOSSES = {
    "gradient_ascent": gradient_ascent, "grad_diff": grad_diff, "llmu": llmu, "npo": npo, "simnpo": simnpo, "dpo": dpo,
    "refuse": refuse, "rmu": rmu, "undial": undial,
}  # fmt: skip
