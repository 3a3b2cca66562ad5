"""The loss measured with one part alone rounded: the truth that the other measures are held against.

One width after another; memory is that of PMPQ, see compression.sensitivity.branches.
"""

from functools import partial

import torch
from torch import Tensor, nn

from compression.core.journal import Journal
from compression.core.skeleton import Skeleton
from compression.sensitivity.branches import rises
from compression.sensitivity.parts import all_linears, by_layer, inner_linears, shared_out
from compression.sensitivity.rounding import Tried, cost, rounded
from compression.sensitivity.settings import Columns, Settings


def measure(skeleton: Skeleton, ids: Tensor, journal: Journal, settings: Settings) -> Columns:
    """Columns cost_b for each width b, and `measured`, the score of the layer's part at the smallest width.

    Scores are the rise of the mean loss in nats a token, which chance may make negative, or an encoder's relative
    change; see `rises`. Per `block` or `group`, its linears are rounded together, and cost_b is a layer's share of that
    by its number of weights, so that costs add up to those of the parts.

    Args:
        ids: calibration tokens int64 [N, T].
        settings: per, widths, group_size and tried; around a model of b bits, cost_b is 0.

    Raises:
        Problem: the group size does not divide a layer's number of inputs.
    """
    around = settings.tried.around if settings.tried else None
    found = {
        bits: rises(
            skeleton,
            ids,
            Journal(journal.folder / f"{bits}-bit"),
            settings.per,
            partial(round_weights, bits=bits, group_size=settings.group_size, tried=settings.tried),
            what=f"measured, {bits} bit",
        )
        for bits in settings.widths
        if bits != around
    }
    if around in settings.widths:
        found[around] = dict.fromkeys(all_linears(skeleton, settings.per), 0.0)
    costs = {cost(bits): shared_out(skeleton, settings.per, found[bits]) for bits in settings.widths}
    return {"measured": by_layer(skeleton, settings.per, found[min(settings.widths)]), **costs}


@torch.no_grad()
def round_weights(part: str, module: nn.Module, bits: int, group_size: int, tried: Tried | None = None) -> None:
    """Puts the weights of all linears of a part on their grids, in place."""
    for layer, linear in inner_linears(part, module).items():
        linear.weight.copy_(rounded(layer, linear.weight, bits, group_size, tried))
