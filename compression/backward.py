"""Gradients throughout a model of which no more than a block is in memory.

Forward, the states that enter each block are written to disk, a file a block. Backward, from the last block to the
first, each is loaded, its states are read, it is run again with a gradient, and all of that is let go: what stays are
the slopes, the gradients of what a sequence sends back (its loss) with respect to the states between two blocks.
Memory is one block, the activations of one batch in it, and the states [N, T, d] and the slopes once each; the disk
holds (depth + 1) times the states before the way back begins, and a file less with every block.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from compression.core.files import read_tensors, write_tensors
from compression.core.journal import Journal
from compression.core.progress import progress
from compression.core.skeleton import Skeleton, linears

# (states [n, T, d] behind the last block, ids [n, T]) -> slopes [S, n, T, d]: S gradients of each sequence with respect
# to these states, which are a leaf that takes one.
Send = Callable[[Tensor, Tensor], Tensor]


class Visit:
    """A block on the way back.

    Attributes:
        index: of the block.
        layers: its linears by full name, loaded.
        finished: whether the slopes are those of the block before it by now.
    """

    def __init__(
        self, skeleton: Skeleton, index: int, parts: tuple[Tensor, ...], entering: Path, slopes: Tensor, last: bool
    ) -> None:
        self.index, self.finished = index, False
        self.layers: dict[str, nn.Linear] = linears(skeleton.load(index), f"{skeleton.path}.{index}")
        self._skeleton, self._parts, self._last = skeleton, parts, last
        self._entering, self._slopes = entering, slopes

    @torch.enable_grad()
    def gradients(
        self, watched: Callable[[], list[Tensor]] = list, again: bool = False
    ) -> Iterator[tuple[int, list[Tensor]]]:
        """Runs batch after batch through the block and back; to be exhausted.

        Args:
            watched: called when a batch has gone through: with respect to what its gradients are to be taken.
            again: whether the block will be run once more. The slopes stay what they are, which saves a part of the
                way back, too.

        Yields:
            For each batch and each of its S slopes, the slope's number and the gradients of what is watched, summed
            over the batch's sequences. They may be gone when the next ones are asked for.
        """
        onward = not (again or self._last)
        entering = read_tensors(self._entering)["states"].to(self._skeleton.device)
        slopes = self._slopes.split([len(part) for part in self._parts], 1)
        for (states, part), own in zip(_paired(entering, self._parts), slopes, strict=True):
            hidden = states.detach().requires_grad_()
            out = self._skeleton.run(self.index, hidden, part)
            wanted = [hidden, *watched()] if onward else watched()
            for draw, slope in enumerate(own):
                found = list(torch.autograd.grad(out, wanted, slope, retain_graph=draw + 1 < len(own)))
                yield draw, found[1:] if onward else found
                if onward:
                    slope.copy_(found[0])  # not before: what is watched may have this very memory for a gradient
        self.finished = not again


def sweep(
    skeleton: Skeleton, parts: tuple[Tensor, ...], send: Send, folder: Path, what: str, first: int = 0
) -> Iterator[Visit]:
    """Visits the blocks from the last to `first`; below that, nothing is run backward.

    When the next visit is asked for, the one before is done: that is journaled, so that a run that was killed goes on
    behind it, from the same bits. A visit of which nothing was asked is run for its slopes.

    Args:
        parts: the text in batches, ids int64 [n, T] each.
        send: what comes back from the end.
        folder: for states and journal; of this sweep alone.
        what: the progress bar's name.
    """
    begun = torch.cat([skeleton.begin(part) for part in parts])  # takes down, too, what blocks are called with
    journal = Journal(folder / "slopes")
    finished, live = journal.load()
    if not live:
        leaving = _forward(skeleton, parts, begun, folder, what, first)
        with torch.enable_grad():
            live = {"slopes": torch.cat([send(own.requires_grad_(), part) for own, part in _paired(leaving, parts)], 1)}
        journal.save(0, live)
        _file(folder, skeleton.depth).unlink()
        del leaving
    del begun
    slopes = live["slopes"].to(skeleton.device)
    blocks = range(skeleton.depth - 1 - finished, first - 1, -1)
    for index in progress(blocks, what=f"{what}, backward", unit="block", total=len(blocks) + finished, done=finished):
        visit = Visit(skeleton, index, parts, _file(folder, index), slopes, last=index == first)
        yield visit
        if not visit.finished and index > first:
            list(visit.gradients())
        skeleton.release(index)
        journal.save(skeleton.depth - index, {"slopes": slopes})
        _file(folder, index).unlink()


@torch.no_grad()
def _forward(
    skeleton: Skeleton, parts: tuple[Tensor, ...], states: Tensor, folder: Path, what: str, first: int
) -> Tensor:
    """Leaves the states [N, T, d] that enter each block from `first` on in files, and gives those behind the last
    block, which have a file as well."""
    written = [index for index in range(skeleton.depth + 1) if _file(folder, index).exists()]
    if written:
        states = read_tensors(_file(folder, written[-1]))["states"].to(skeleton.device)
    else:
        write_tensors(_file(folder, 0), {"states": states})
    finished = written[-1] if written else 0
    blocks = range(finished, skeleton.depth)
    for index in progress(blocks, what=f"{what}, forward", unit="block", total=skeleton.depth, done=finished):
        skeleton.load(index)
        for own, part in _paired(states, parts):
            own.copy_(skeleton.run(index, own, part))
        skeleton.release(index)
        write_tensors(_file(folder, index + 1), {"states": states})
        if index < first:
            _file(folder, index).unlink()
    return states


def _paired(states: Tensor, parts: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, Tensor]]:
    """The states [n, T, d] of each batch, and its ids [n, T]."""
    return zip(states.split([len(part) for part in parts]), parts, strict=True)


def _file(folder: Path, index: int) -> Path:
    """Where the states that enter block `index` are kept."""
    return folder / f"states-{index:05}.safetensors"
