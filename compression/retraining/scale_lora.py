"""ScaleLoRA: each kept weight is scaled by a low-rank product (PERP, arXiv 2312.15230)."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from compression.retraining.parameters import Merge, adapt
from compression.training.masked_linear import SCALE_LORA


def attach(
    model: nn.Module, keep: dict[str, Tensor], options: Mapping[str, Any]
) -> tuple[dict[str, nn.Parameter], Merge]:
    """W o (B A) for every pruned layer; arguments and result as in `parameters.adapt`.

    Args:
        options: beside those, start. `broken`: one rank starts at ones, the others as in LoRA, so that all ranks
            learn different things. `paper`: every entry of A and B at 1/sqrt(r); all ranks then get the same gradient
            and stay equal for ever, a rank of one in effect.
    """
    parameters, layers, merge = adapt(model, keep, options, SCALE_LORA)
    if options["start"] == "paper":
        for layer in layers.values():
            layer.A.data.fill_(1 / math.sqrt(options["rank"]))
            layer.B.data.fill_(1 / math.sqrt(options["rank"]))
    return parameters, merge
