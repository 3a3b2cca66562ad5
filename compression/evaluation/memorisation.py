"""How much of a text a model knows by heart, its answer y of L tokens read behind its prompt x.

    loss                   -1/L sum_i log p(y_i | x, y_<i), in nats a token
    probability            exp(-loss), the geometric mean of the tokens' probabilities
    exact memorisation     share of the tokens with y_i = argmax p(. | x, y_<i)
    extraction strength    1 - k*/L, k* the shortest prefix of y behind which greedy decoding gives all the rest

as the benchmark OpenUnlearning has them (arXiv 2506.12618, after Tirumala et al. 2022 and Carlini et al. 2021). The
rest is given where every token of it is the arg max behind the true tokens, so one pass tells all four.
"""

import torch
from torch import Tensor

from compression.core.skeleton import Skeleton
from compression.evaluation.loss import TokenFigures, last_states, token_figures
from compression.training.samples import Samples


def memorisation(skeleton: Skeleton, texts: dict[str, Samples]) -> dict[str, dict[str, float]]:
    """Means over the samples of each text: loss, probability, exact_memorisation, extraction_strength; one walk."""
    states = last_states(skeleton, {name: samples.ids for name, samples in texts.items()})
    by_sample = {name: sample_figures(token_figures(skeleton, states[name]), own) for name, own in texts.items()}
    return {name: {key: float(values.mean()) for key, values in own.items()} for name, own in by_sample.items()}


def sample_figures(figures: TokenFigures, samples: Samples) -> dict[str, Tensor]:
    """The four by name, each float64 [N]; only answers count, and no answer is empty."""
    counted = samples.answer[:, 1:]
    length = counted.sum(1).double()
    loss = (figures.loss.double() * counted).sum(1) / length
    right = figures.greedy & counted
    # From the end: what follows a token is right as long as no counted token so far was wrong.
    unbroken = (figures.greedy | ~counted).flip(1).cumprod(1).flip(1).bool() & counted
    return {
        "loss": loss,
        "probability": torch.exp(-loss),
        "exact_memorisation": right.sum(1) / length,
        "extraction_strength": unbroken.sum(1) / length,
    }


def answer_mean(values: Tensor, samples: Samples) -> float:
    """Mean of a figure [N, T - 1] of the predicted tokens over all that are answers."""
    return float(values.double()[samples.answer[:, 1:]].mean())
