"""What it costs to change one part of a model alone, for every part, in one walk.

The obvious way runs a model for each part from start to end. Here all of them walk together: up to block l the model
with a part of block l changed is the dense one, so its stream of hidden states branches off there, and each block is
read once, for the dense stream and for every stream that has branched off before.

Each branch holds states [N, T, d]. Parts whose branches would take more than ALIVE bytes together wait for another
pass, which starts at the block where the first of them lies. More passes read more blocks; as many are computed.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from compression.core import batches
from compression.core.journal import Journal
from compression.core.progress import progress
from compression.core.skeleton import Skeleton
from compression.evaluation.loss import head_losses
from compression.sensitivity.parts import parts

ALIVE = 1 << 28

Change = Callable[[str, nn.Module], None]


@torch.no_grad()
def rises(skeleton: Skeleton, ids: Tensor, journal: Journal, per: str, change: Change, what: str) -> dict[str, float]:
    """How much the model's output suffers when one part alone is changed.

    Args:
        ids: tokens int64 [N, T].
        per: what a part is, `block` or `layer`.
        change: changes a part's parameters in place, given its full name and its module.
        what: is told beside the bar.

    Returns:
        by part: the rise of the mean loss in nats a token for a causal model; for an encoder, which has no
        loss of its own, the relative change of its last states ||h_s - h|| / ||h||.
    """
    split = batches.split(ids, skeleton.device)
    begun = torch.cat([skeleton.begin(batch) for batch in split])
    block_of = {part: index for index in range(skeleton.depth) for part in parts(skeleton, index, per)}
    groups = _groups(list(block_of), max(1, ALIVE // begun.nbytes))
    starts = [block_of[group[0]] for group in groups]
    steps = [(number, index) for number, start in enumerate(starts) for index in range(start, skeleton.depth)]

    def run(index: int, hidden: Tensor) -> Tensor:
        streams = zip(hidden.split(len(split[0])), split, strict=True)
        return torch.cat([skeleton.run(index, states, batch) for states, batch in streams])

    finished, state = journal.load()
    state = {name: tensor.to(skeleton.device) for name, tensor in state.items()} or {"dense": begun}
    for done, (number, index) in enumerate(
        progress(steps[finished:], what=what, unit="block", total=len(steps), done=finished), finished + 1
    ):
        skeleton.load(index)
        for name in _named(state, "branch."):
            state[name] = run(index, state[name])
        for part, module in parts(skeleton, index, per).items():
            if part in groups[number]:
                with _changed(part, module, change):
                    state[f"branch.{part}"] = run(index, state["dense"])
        if index in starts[number + 1 : number + 2]:
            state["next"] = state["dense"] if number == 0 else state.pop("dense")
        if "dense" in state:  # which the first pass takes to the end
            state["dense"] = run(index, state["dense"])
        skeleton.release(index)
        if index == skeleton.depth - 1:
            if number == 0:
                state["last"] = state["dense"]
            state.pop("dense", None)
            base = _output(skeleton, state["last"], split)
            for name in _named(state, "branch."):
                score = _distance(_output(skeleton, state.pop(name), split), base)
                state[name.replace("branch.", "score.", 1)] = torch.tensor(score, dtype=torch.float64)
            if "next" in state:
                state["dense"] = state.pop("next")
        journal.save(done, state)
    return {part: float(state[f"score.{part}"]) for part in block_of}


@contextmanager
def _changed(part: str, module: nn.Module, change: Change) -> Iterator[None]:
    """The module with its parameters changed, for as long as it lasts."""
    stored = [parameter.clone() for parameter in module.parameters()]
    change(part, module)
    try:
        yield
    finally:
        for parameter, tensor in zip(module.parameters(), stored, strict=True):
            parameter.copy_(tensor)


def _groups(names: list[str], size: int) -> list[list[str]]:
    return [names[start : start + size] for start in range(0, len(names), size)]


def _named(state: dict[str, Tensor], prefix: str) -> list[str]:
    return [name for name in state if name.startswith(prefix)]


def _output(skeleton: Skeleton, hidden: Tensor, split: tuple[Tensor, ...]) -> Tensor:
    """float64: the token losses of a causal model [N, T - 1], the last states of an encoder [N, T, d]."""
    end = head_losses if skeleton.causal else Skeleton.end
    streams = zip(hidden.split(len(split[0])), split, strict=True)
    return torch.cat([end(skeleton, states, batch).double() for states, batch in streams])


def _distance(changed: Tensor, base: Tensor) -> float:
    if base.ndim == 2:
        return float(changed.mean() - base.mean())
    return float((changed - base).norm() / base.norm())
