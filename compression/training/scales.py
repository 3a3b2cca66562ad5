"""Scales of the grid, norms and biases learn. Codes stay, and with them the mask.

A code moves by a whole step of its grid or not at all; at 4 bits that is a seventh of the largest weight of its group.
A scale moves all weights of its group by as little as its own type can tell, 0.4 % in bfloat16.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compression.core import masks
from compression.core.checkpoint import Checkpoint
from compression.core.errors import Problem
from compression.quantization.packed import pack, unpack
from compression.quantization.scheme import anatomy, from_manifest, layouts
from compression.training.masked_linear import at_start
from compression.training.scaled_linear import attach
from compression.training.trained import Trained, targeted


def freed(
    model: nn.Module,
    source: Checkpoint,
    stored: Mapping[str, Tensor],
    keep: Mapping[str, Tensor],
    options: Mapping[str, Any],
) -> Trained:
    """See compression.unlearning.TRAINED; of the options it reads targets, which say whose scales learn.

    `changed_scales` is the share of all layers' scales that have moved.

    Raises:
        Problem: no layer is quantised.
    """
    schemes = from_manifest(source.manifest)
    parts = {layer: unpack(layer, stored, schemes[layer].bits) for layer in source.layers if layer in schemes}
    if not parts:
        raise Problem(str(source.folder), "no layer is quantised, so there are no scales to train", "valid: codes")
    device = next(model.parameters()).device
    chosen = targeted(parts, options["targets"], "unlearn.targets")
    codes = {layer: own for layer, (own, _) in chosen.items()}
    layers = attach(model, codes, {layer: grid.to(device) for layer, (_, grid) in chosen.items()})
    vectors = {name: own for name, own in model.named_parameters() if own.ndim == 1}
    before = {name: own.detach().clone() for name, own in vectors.items()}
    stays = layouts(schemes, anatomy(source.folder))
    for vector in vectors.values():
        vector.requires_grad_(True)

    @contextmanager
    def all_at_start() -> Iterator[None]:
        now = {name: own.data for name, own in vectors.items()}
        for name, own in vectors.items():
            own.data = before[name]
        try:
            with at_start(layers.values()):
                yield
        finally:
            for name, own in vectors.items():
                own.data = now[name]

    def rewritten(stored: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
        tensors: dict[str, Tensor] = {}
        changed = 0
        for name, layer in layers.items():
            own, grid = codes[name], layer.grid().to("cpu")
            if name in keep:
                masks.prove(name, grid.values(own), keep[name])
            changed += int((grid.scale != parts[name][1].scale).sum())
            tensors |= pack(name, own, grid, stays[name])
        # A vector that has not moved keeps its stored value, which may be finer than what the model computes with.
        moved = {name: own.detach().cpu() for name, own in vectors.items() if not torch.equal(own, before[name])}
        tensors |= {name: own.to(stored[name].dtype) for name, own in moved.items()}
        return tensors, {"changed_scales": changed / sum(grid.scale.numel() for _, grid in parts.values())}

    parameters = {f"{name}.t": layer.t for name, layer in layers.items()}
    return Trained(parameters | vectors, all_at_start, rewritten)
