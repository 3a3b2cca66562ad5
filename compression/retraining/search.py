"""Which learning rate suits: short runs of a few rates, judged on text that is not trained on."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from compression.core.journal import Journal
from compression.training.loop import Recipe, train
from compression.training.workers import workers

LOSS = "search.held_out"


def best_learning_rate(
    parameters: dict[str, nn.Parameter],
    loss: Callable[[int], tuple[Tensor, dict[str, float]]],
    held_out: Callable[[], float],
    recipe: Recipe,
    rates: list[float],
    steps: int,
    journal: Journal,
    tokens: int,
) -> tuple[Recipe, dict[str, float]]:
    """Trains `steps` steps with each rate from the same start, with a schedule of that length.

    Args:
        parameters: left as they were.
        loss, held_out: as in compression.training.loop.
        rates: candidates; without any, the recipe stays as it is.
        tokens: a batch, for the bar.
        journal: of the training that follows; each candidate keeps one of its own beside it, so that a killed search
            does not begin again.

    Returns:
        the recipe with the rate whose held-out loss is lowest, and the held-out loss by rate.
    """
    if not rates:
        return recipe, {}
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    found: dict[str, float] = {}
    for rate in rates:
        own = Journal(journal.folder / f"search-{rate}")
        _, state = own.load()
        if LOSS not in state:
            short = replace(recipe, steps=steps, learning_rate=rate)
            train(parameters, loss, short, own, f"learning rate {rate}", tokens)
            state = {LOSS: torch.tensor(held_out(), dtype=torch.float64)}
            if workers().first:
                own.save(steps, state)
        found[str(rate)] = state[LOSS].item()
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(start[name])
    return replace(recipe, learning_rate=float(min(found, key=lambda rate: found[rate]))), found
