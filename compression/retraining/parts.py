"""A block's parts, and the calibration tokens on their way through them: what reconstruction computes with.

The attention is the child of the block that holds the first linear of the forward pass; the rest of the block is run
with the attention's output put in its place. Nothing here knows a family by name.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from compression.core import batches
from compression.core.checkpoint import Checkpoint
from compression.core.skeleton import Skeleton


class Part(NamedTuple):
    """What of a block learns towards a target of its own.

    Attributes:
        name: block, attention or mlp.
        modules: those whose parameters learn, by name in the block.
        attention: name of the block's child that is its attention; not looked at for a whole block.
        returned: how many things the attention returns, its states first; 0 if it returns them bare.
    """

    name: str
    modules: frozenset[str]
    attention: str = ""
    returned: int = 0


class Walk:
    """The calibration tokens on their way through the model, and the block at hand.

    Attributes:
        skeleton: of the model whose block was placed last: the dense one, or the pruned one, which may be narrower.
        hidden: X [N, T, d], the states that enter the next block.
    """

    def __init__(
        self,
        source: Checkpoint,
        dense: Checkpoint,
        ids: Tensor,
        drawn: Tensor,
        hidden: Tensor | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._at_hand: dict[int, dict[str, Tensor]] = {}
        self.batches = batches.split(ids, device)
        self.drawn = drawn  # token ids of the shape of a training batch

        def begin(model: Checkpoint) -> tuple[Skeleton, list[Tensor]]:
            self._at_hand[0] = model.block(0)
            skeleton = Skeleton(model.folder, model.outer(), self._at_hand.pop, device, dtype)
            skeleton.begin(drawn)
            return skeleton, [skeleton.begin(batch) for batch in self.batches]

        with torch.no_grad():
            self.skeleton, begun = begin(source)
            self._pruned = self._dense = self.skeleton
            if source.layers != dense.layers:
                self._dense, _ = begin(dense)
        self.hidden = torch.cat(begun) if hidden is None else hidden.to(device)

    def place(self, index: int, tensors: Mapping[str, Tensor], dense: bool = False) -> nn.Module:
        """Block `index` with a copy of these weights, by name in the block, in the computing type."""
        self.skeleton.release(index)
        self.skeleton = self._dense if dense else self._pruned
        prefix = f"{self.skeleton.path}.{index}."
        self._at_hand[index] = {prefix + name: tensor.clone() for name, tensor in tensors.items()}
        return self.skeleton.load(index)

    def output(self, index: int, part: Part, hidden: Tensor, ids: Tensor, attended: Tensor | None) -> Tensor:
        """What a part of the placed block gives [n, T, d].

        Args:
            hidden: rows of X [n, T, d].
            ids: [n, T], of which only the shape matters.
            attended: the attention's output for these rows, for the part that comes after it.
        """
        block: nn.Module = self.skeleton.model.get_submodule(f"{self.skeleton.path}.{index}")
        if part.name == "block":
            return self.skeleton.run(index, hidden, ids)
        attention = block.get_submodule(part.attention)
        if part.name == "attention":
            return _first_output(attention, lambda: self.skeleton.run(index, hidden, ids))
        given = (attended, *[None] * (part.returned - 1)) if part.returned else attended
        attention.forward = lambda *_, **__: given
        try:
            return self.skeleton.run(index, hidden, ids)
        finally:
            del attention.forward

    @torch.no_grad()
    def outputs(self, index: int, part: Part, attended: Tensor | None) -> Tensor:
        """`output` for all rows [N, T, d]."""
        out = torch.empty_like(self.hidden)
        size = len(self.batches[0])
        for number, (ids, hidden) in enumerate(zip(self.batches, self.hidden.split(size), strict=True)):
            rows = slice(number * size, number * size + len(ids))
            out[rows] = self.output(index, part, hidden, ids, None if attended is None else attended[rows])
        return out


def find_parts(block: nn.Module, run: Callable[[], Any], objective: str) -> list[Part]:
    """The parts of a block, in the order in which they learn; one that has no two halves is one part.

    Args:
        run: takes anything through the block.
        objective: `block` or `half_block`.
    """
    everything = frozenset(owner(name) for name, _ in block.named_parameters())
    visited: list[str] = []
    ends: dict[str, tuple[int, Any]] = {}  # child -> how many modules were visited when it was left, what it returned
    handles = [
        block.get_submodule(name).register_forward_pre_hook(lambda _m, _i, name=name: visited.append(name))
        for name in everything
    ] + [
        child.register_forward_hook(lambda _m, _i, out, name=name: ends.update({name: (len(visited), _length(out))}))
        for name, child in block.named_children()
    ]
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    linears = [name for name in visited if isinstance(block.get_submodule(name), nn.Linear)]
    attention, dot, _ = linears[0].partition(".") if linears else ("", "", "")
    if objective == "block" or not dot:
        return [Part("block", everything)]
    end, returned = ends[attention]
    first = frozenset(visited[:end])
    if first.issuperset(linears):
        return [Part("block", everything)]
    return [Part("attention", first, attention, returned), Part("mlp", everything - first, attention, returned)]


def owner(parameter: str) -> str:
    """Name of the module that holds a parameter."""
    return parameter.rpartition(".")[0]


def _first_output(module: nn.Module, run: Callable[[], Any]) -> Tensor:
    """The states that `module` gives while `run` runs, which goes no further."""
    taken: list[Tensor] = []

    def stop(_module: nn.Module, _inputs: Any, output: Any) -> None:
        taken.append(output[0] if isinstance(output, tuple) else output)
        raise _Stop

    handle = module.register_forward_hook(stop)
    with suppress(_Stop):
        run()
    handle.remove()
    return taken[0]


def _length(output: Any) -> int:
    return len(output) if isinstance(output, tuple) else 0


class _Stop(Exception):
    pass
