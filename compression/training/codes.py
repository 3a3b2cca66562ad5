"""Codes learn: masked low-rank updates straight through the rounding to the grid. Scales, norms and biases stay.

A model that is not quantised learns the same way; its weights take the update as it is.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compression.core import masks
from compression.core.checkpoint import Checkpoint
from compression.quantization.packed import pack, unpack
from compression.quantization.scheme import anatomy, from_manifest, layouts
from compression.training.masked_linear import at_start, attach
from compression.training.trained import Trained, targeted


def freed(
    model: nn.Module,
    source: Checkpoint,
    stored: Mapping[str, Tensor],
    keep: Mapping[str, Tensor],
    options: Mapping[str, Any],
) -> Trained:
    """See compression.unlearning.TRAINED; of the options it reads targets, rank, alpha and seed.

    What is rewritten is proven against the mask. `changed_codes` is the share of all layers' weights that have left
    their code, or have moved where there is none.
    """
    schemes = from_manifest(source.manifest)
    grids = {layer: unpack(layer, stored, schemes[layer].bits)[1] for layer in source.layers if layer in schemes}
    device = next(model.parameters()).device
    every = {layer: keep.get(layer, torch.ones(*shape, dtype=torch.bool)) for layer, shape in source.layers.items()}
    chosen = targeted(every, options["targets"], "unlearn.targets")
    on_device = {layer: grid.to(device) for layer, grid in grids.items()}
    layers = attach(model, chosen, options["rank"], options["alpha"], options["seed"], on_device)
    stays = layouts(schemes, anatomy(source.folder)) if schemes else {}

    def rewritten(stored: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
        tensors: dict[str, Tensor] = {}
        changed = 0
        for name, layer in layers.items():
            if name not in grids:
                before = stored[f"{name}.weight"]
                tensors[f"{name}.weight"] = layer.merged(before).cpu()
                changed += int((tensors[f"{name}.weight"] != before).sum())
                continue
            before, grid = unpack(name, stored, grids[name].bits)
            merged = layer.merged().cpu()
            # A value is one code, but in bfloat16 the widest grids' neighbours may share one: what stays keeps its own.
            codes = torch.where(merged == grid.values(before), before, grid.codes(merged))
            if name in keep:
                masks.prove(name, grid.values(codes), keep[name])
            changed += int((codes != before).sum())
            tensors |= pack(name, codes, grid, stays[name])
        return tensors, {"changed_codes": changed / sum(rows * width for rows, width in source.layers.values())}

    parameters = {f"{name}.{part}": getattr(layer, part) for name, layer in layers.items() for part in "AB"}
    return Trained(parameters, partial(at_start, layers.values()), rewritten)
