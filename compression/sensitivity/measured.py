"""The loss measured with one part alone rounded: the truth that the other measures are held against.

One width after another; memory is that of PMPQ, see compression.sensitivity.branches.
"""

from functools import partial

import torch
from torch import Tensor, nn

from compression.core.journal import Journal
from compression.core.skeleton import Skeleton
from compression.sensitivity.branches import rises
from compression.sensitivity.parts import by_layer, inner_linears, shared_out
from compression.sensitivity.rounding import cost, rounded
from compression.sensitivity.settings import Columns, Settings


def measure(skeleton: Skeleton, ids: Tensor, journal: Journal, settings: Settings) -> Columns:
    """Columns cost_b for each width b, and `measured`, the score of the layer's part at the smallest width.

    Scores are the rise of the mean loss in nats a token, which chance may make negative, or an encoder's relative
    change; see `rises`. Per `block`, all linears of a block are rounded together, and cost_b is a layer's share of
    that by its number of weights, so that costs add up to those of the blocks.

    Args:
        ids: calibration tokens int64 [N, T].
        settings: per, widths and group_size.

    Raises:
        Problem: the group size does not divide a layer's number of inputs.
    """
    found = {
        bits: rises(
            skeleton,
            ids,
            Journal(journal.folder / f"{bits}-bit"),
            settings.per,
            partial(round_weights, bits=bits, group_size=settings.group_size),
            what=f"measured, {bits} bit",
        )
        for bits in settings.widths
    }
    costs = {cost(bits): shared_out(skeleton, settings.per, scores) for bits, scores in found.items()}
    return {"measured": by_layer(skeleton, settings.per, found[min(settings.widths)]), **costs}


@torch.no_grad()
def round_weights(part: str, module: nn.Module, bits: int, group_size: int) -> None:
    """Puts the weights of all linears of a part on their grids, in place."""
    for layer, linear in inner_linears(part, module).items():
        linear.weight.copy_(rounded(layer, linear.weight, bits, group_size))
