"""What an objective sees in a step: samples of both texts, the model, and the model that it started as."""

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, suppress
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compression.core.skeleton import find_blocks
from compression.training.samples import Samples


class Learner:
    """The model that unlearns, and within the same weights the one that it started as.

    Every method takes any number of samples, which go through the model together, and gives a tensor for each. Rows are
    filled up on the right only, so what stands there reaches no token that counts.

    Args:
        at_start: within it the model computes with the weights that it started with.
    """

    def __init__(self, model: nn.Module, at_start: Callable[[], AbstractContextManager[None]]) -> None:
        self.model, self.at_start = model, at_start
        self.blocks = model.get_submodule(find_blocks(model))

    def logits(self, *samples: Samples) -> list[Tensor]:
        """[N, T, V] of each."""
        return _apart(self.model(input_ids=_together(samples), use_cache=False).logits, samples)

    def states(self, block: int, *samples: Samples) -> list[Tensor]:
        """Hidden states [N, T, d] of each behind a block, counted from 0; later blocks are not computed."""
        taken: list[Tensor] = []

        def take(module: nn.Module, inputs: Any, output: Any) -> None:
            taken.append(output[0] if isinstance(output, tuple) else output)
            raise _Taken

        handle = self.blocks[block].register_forward_hook(take)  # type: ignore[index]
        try:
            with suppress(_Taken):
                self.model(input_ids=_together(samples), use_cache=False)
        finally:
            handle.remove()
        return _apart(taken[0], samples)

    def start_logits(self, *samples: Samples) -> list[Tensor]:
        """As `logits`, of the start model and without a gradient."""
        with torch.no_grad(), self.at_start():
            return self.logits(*samples)

    def start_states(self, block: int, *samples: Samples) -> list[Tensor]:
        """As `states`, of the start model and without a gradient."""
        with torch.no_grad(), self.at_start():
            return self.states(block, *samples)


class Draw(NamedTuple):
    """A step's share of the data, and what to put it through; all on the model's device.

    Attributes:
        forget, retain: as many rows of each.
        learner: the model.
        answers: to the retained prompts, token ids, of all rows that are trained on.
        refusals: other answers, "I don't know" say, token ids.
        generator: of this step alone, on the CPU.
    """

    forget: Samples
    retain: Samples
    learner: Learner
    answers: list[list[int]]
    refusals: list[list[int]]
    generator: torch.Generator


class _Taken(Exception):
    pass


def _together(samples: Collection[Samples]) -> Tensor:
    """All rows as one batch, filled up to the longest."""
    longest = max(each.ids.shape[1] for each in samples)
    return torch.cat([F.pad(each.ids, (0, longest - each.ids.shape[1])) for each in samples])


def _apart(rows: Tensor, samples: Collection[Samples]) -> list[Tensor]:
    parts = rows.split([len(each.ids) for each in samples])
    return [part[:, : each.ids.shape[1]] for part, each in zip(parts, samples, strict=True)]
