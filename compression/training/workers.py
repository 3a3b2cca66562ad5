"""Several processes that train one model: each computes some batches of every step, and all sum up what they found.

accelerate tells how many there are and carries the sums, over NCCL between GPUs and over gloo between CPUs. All start
from the same values and add the same sums, so they stay equal to the bit; the first one alone writes files.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor


class Workers(NamedTuple):
    """How many processes there are, and which one this is, counted from 0."""

    size: int
    rank: int

    @property
    def first(self) -> bool:
        return self.rank == 0


def workers() -> Workers:
    """Those that tasks.core.launch has started; else this process alone."""
    state = PartialState()
    return Workers(state.num_processes, state.process_index)


def summed(tensor: Tensor) -> Tensor:
    """The sum over all processes of a tensor that each of them has in the same shape."""
    if workers().size == 1:
        return tensor
    total: Tensor = reduce(tensor.contiguous(), "sum")
    return total


def summed_figures(figures: Mapping[str, float]) -> dict[str, float]:
    """The sum over all processes of every figure, by name."""
    if workers().size == 1:
        return dict(figures)
    told = torch.tensor(list(figures.values()), dtype=torch.float64, device=PartialState().device)
    return dict(zip(figures, summed(told).tolist(), strict=True))
