"""PMPQ: what it costs to prune one block alone (CPTQuant, arXiv 2412.03599, section on pruning sensitivity).

The paper zeroes the s smallest entries of every tensor of a block and measures the loss; its code takes
ppl_base - ppl_sparse, so that sensitive means negative. Here it is the rise of the mean loss, so that larger
means more sensitive, and it is measured on calibration text, not on the test set. It can be done per linear as well.
"""

import torch
from torch import Tensor, nn

from compression.core.journal import Journal
from compression.core.skeleton import Skeleton
from compression.sensitivity.branches import rises
from compression.sensitivity.parts import by_layer
from compression.sensitivity.settings import Columns, Settings


def measure(skeleton: Skeleton, ids: Tensor, journal: Journal, settings: Settings) -> Columns:
    """Column `pmpq`: the rise of the mean loss in nats a token, an encoder's relative change; see `rises`.

    Args:
        ids: calibration tokens int64 [N, T].
        settings: sparsity is the share s of each tensor's entries that are zeroed, weights, biases and norms alike;
            per `layer` one linear at a time is pruned, its weight and its bias.
    """
    found = rises(
        skeleton, ids, journal, settings.per, lambda _, part: zero_smallest(part, settings.sparsity), what="pmpq"
    )
    return {"pmpq": by_layer(skeleton, settings.per, found)}


@torch.no_grad()
def zero_smallest(part: nn.Module, sparsity: float) -> None:
    """Zeroes round(sparsity * n) entries of least |w| in every tensor of n entries, in place."""
    for parameter in part.parameters():
        flat = parameter.view(-1)
        count = round(sparsity * len(flat))
        order = flat.abs().float().sort(stable=True).indices
        flat[order[:count]] = 0
