"""What an objective sees in a step: samples of both texts, the model, and the model that it started as."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from compression.core.skeleton import find_blocks
from compression.training.samples import Samples


class Learner:
    """The model that unlearns, and within the same weights the one that it started as.

    Every method takes any number of samples and gives a tensor for each. Those with rows of one length go through the
    model together. Rows are filled up on the right only, so what stands there reaches no token that counts.

    Args:
        at_start: within it the model computes with the weights that it started with.
    """

    def __init__(self, model: nn.Module, at_start: Callable[[], AbstractContextManager[None]]) -> None:
        self.model, self.at_start = model, at_start
        self.blocks = model.get_submodule(find_blocks(model))

    def logits(self, *samples: Samples) -> list[Tensor]:
        """[N, T, V] of each."""
        return _by_length(samples, lambda ids: self.model(input_ids=ids, use_cache=False).logits)

    def states(self, block: int, *samples: Samples) -> list[Tensor]:
        """Hidden states [N, T, d] of each behind a block, counted from 0; later blocks are not computed."""
        taken: list[Tensor] = []

        def take(module: nn.Module, inputs: Any, output: Any) -> None:
            taken.append(output[0] if isinstance(output, tuple) else output)
            raise _Taken

        def behind(ids: Tensor) -> Tensor:
            with suppress(_Taken):
                self.model(input_ids=ids, use_cache=False)
            return taken.pop()

        handle = self.blocks[block].register_forward_hook(take)  # type: ignore[index]
        try:
            return _by_length(samples, behind)
        finally:
            handle.remove()

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


def _by_length(samples: Sequence[Samples], through: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """What `through` gives for each, called once for all that have rows of the same length."""
    found: dict[int, Iterator[Tensor]] = {}
    for length in {each.ids.shape[1] for each in samples}:
        same = [each.ids for each in samples if each.ids.shape[1] == length]
        found[length] = iter(through(torch.cat(same)).split([len(ids) for ids in same]))
    return [next(found[each.ids.shape[1]]) for each in samples]
