"""Noise: TDMPQ as its authors' code has it (CPTQuant, arXiv 2412.03599), kept for comparison.

There is no derivative in that code. Unit Gaussian noise is added to the first tensor of a block (the queries' or the
keys' weight, by family) and the loss is taken. Here the loss of the model as it is is taken off, which leaves the ranks
alone, and the mean is over DRAWS noises where the code draws one. A deviation of 1 is many times that of trained
weights, so it tells how much the block's first layer is needed at all, rather than what rounding does.
"""

import zlib

import torch
from torch import Tensor, nn

from compression.core.journal import Journal
from compression.core.skeleton import Skeleton
from compression.sensitivity.branches import rises
from compression.sensitivity.parts import by_layer
from compression.sensitivity.settings import Columns, Settings

DRAWS = 3


def measure(skeleton: Skeleton, ids: Tensor, journal: Journal, settings: Settings) -> Columns:
    """Column `noise`: the rise of the mean loss in nats a token, an encoder's relative change; see `rises`.

    Args:
        ids: calibration tokens int64 [N, T].
        settings: noise is the standard deviation; per `layer` every linear's own weight gets it.
    """
    sums: dict[str, float] = {}
    for draw in range(DRAWS):

        def disturb(part: str, module: nn.Module, draw: int = draw) -> None:
            add_noise(next(module.parameters()), settings.noise, draw, part)

        own = Journal(journal.folder / f"draw-{draw}")
        found = rises(skeleton, ids, own, settings.per, disturb, what=f"noise {draw + 1} of {DRAWS}")
        sums = {part: sums.get(part, 0.0) + rise for part, rise in found.items()}
    return {"noise": by_layer(skeleton, settings.per, {part: total / DRAWS for part, total in sums.items()})}


@torch.no_grad()
def add_noise(weight: Tensor, deviation: float, draw: int, part: str) -> None:
    """Adds Gaussian noise in place; draw and the part's name alone decide which."""
    generator = torch.Generator().manual_seed(zlib.crc32(part.encode()) + draw)
    weight += deviation * torch.randn(weight.shape, generator=generator).to(weight)
