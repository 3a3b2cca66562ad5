"""Batches walk through a block in step: nobody passes a layer before it was changed, everybody sees the change."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from compression.core.errors import Problem
from compression.lockstep import walk_in_step


class Block(nn.Module):
    """Two layers, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        for layer in (self.first, self.second):
            layer.weight.data = torch.eye(2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x))
        return out


def walk(batches: list[Tensor], change: Callable[[Block, str], None]) -> tuple[list[tuple[object, ...]], list[Tensor]]:
    """The log of stops and changes, and what comes out for every batch."""
    block, log, outputs = Block(), [], [torch.empty(0)] * len(batches)

    def run(batch: int) -> None:
        outputs[batch] = block(batches[batch]).detach()

    def note(layer: str) -> None:
        log.append(("change", layer))
        change(block, layer)

    walk_in_step(
        len(batches),
        run,
        dict(block.named_children()),
        lambda batch, layer, inputs: log.append((batch, layer, inputs.flatten().tolist())),
        note,
    )
    return log, outputs


@torch.no_grad()
def double(block: Block, layer: str) -> None:
    block.get_submodule(layer).weight.mul_(2)  # type: ignore[operator, union-attr]


def test_every_batch_arrives_before_a_layer_changes() -> None:
    batches = [torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 1.0]])]
    log, outputs = walk(batches, double)
    assert log == [
        (0, "first", [1.0, 0.0]),
        (1, "first", [0.0, 1.0]),
        (2, "first", [1.0, 1.0]),
        ("change", "first"),
        (0, "second", [2.0, 0.0]),
        (1, "second", [0.0, 2.0]),
        (2, "second", [2.0, 2.0]),
        ("change", "second"),
    ]
    assert [output.flatten().tolist() for output in outputs] == [[4.0, 0.0], [0.0, 4.0], [4.0, 4.0]]


def test_one_batch_is_enough() -> None:
    log, outputs = walk([torch.tensor([[3.0, 5.0]])], double)
    assert [entry[1] for entry in log] == ["first", "first", "second", "second"]
    assert outputs[0].tolist() == [[12.0, 20.0]]


@pytest.mark.parametrize("skips", [0, 1])
def test_batches_that_part_ways_are_refused(skips: int) -> None:
    block = Block()

    def run(batch: int) -> None:
        block(torch.ones(1, 2)) if batch != skips else block.second(torch.ones(1, 2))

    changed: list[str] = []
    with pytest.raises(Problem, match=r"first: batches part ways in this block \(\['first', 'second'\]\)\n.*experts"):
        walk_in_step(3, run, dict(block.named_children()), lambda *_: None, changed.append)
    assert changed == []


def test_batch_that_leaves_early_is_refused() -> None:
    block = Block()

    def run(batch: int) -> None:
        block(torch.ones(1, 2)) if batch else block.first(torch.ones(1, 2))

    with pytest.raises(Problem, match="part ways"):
        walk_in_step(2, run, dict(block.named_children()), lambda *_: None, lambda _: None)


def test_no_hook_stays_after_an_error() -> None:
    block = Block()

    def fail(_: str) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        walk_in_step(2, lambda _: block(torch.ones(1, 2)), dict(block.named_children()), lambda *_: None, fail)
    assert not any(layer._forward_pre_hooks for layer in block.children())
