"""Relearning: a little training on a few of the forgotten samples (Hu et al. 2024, arXiv 2406.13356).

What returns far faster than a model that never saw the text learns it was hidden, not forgotten; so the same attack on
such a model belongs beside it.
"""

import torch
from torch import Tensor

from compression.attacks import Reader
from compression.core.checkpoint import Checkpoint
from compression.core.journal import Journal
from compression.quantization.packed import block_reader, plain_outer
from compression.training.loop import Recipe, train
from compression.training.masked_linear import LORA_PRUNE, attach
from compression.training.samples import Samples
from compression.training.text import Shuffled, answer_loss
from compression.training.whole import load_whole


def relearned(
    source: Checkpoint,
    samples: Samples,
    recipe: Recipe,
    sequences: int,
    rank: int,
    seed: int,
    journal: Journal,
    device: torch.device,
    dtype: torch.dtype,
) -> Reader:
    """The weights after training on `samples`, low-rank updates on every linear, in full precision.

    Whoever attacks is bound by no mask and no grid.

    Args:
        samples: what of the forgotten the attacker has.
        sequences: a step.
        rank: of the updates; alpha is twice that.
        dtype: of the forward and backward pass, and of the weights that are given.
    """
    read = block_reader(source)
    tensors = plain_outer(source)
    for index in range(source.depth):
        tensors |= read(index)
    model = load_whole(source.folder, tensors, device, dtype)
    # No mask holds: the form without one spares a product a layer, and a single True stands for all.
    every = {layer: torch.ones(()).bool().expand(*shape) for layer, shape in source.layers.items()}
    layers = attach(model, every, rank, 2 * rank, seed, form=LORA_PRUNE)
    parameters = {f"{name}.{part}": getattr(layer, part) for name, layer in layers.items() for part in "AB"}
    draw = Shuffled(torch.arange(len(samples.ids)), sequences, seed)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        value = answer_loss(model, samples.take(draw(step)))
        return value, {"loss": value.item()}

    train(parameters, loss, recipe, journal, f"relearn, {recipe.steps} steps", sequences * samples.ids.shape[1])
    merged = {f"{name}.weight": layer.merged().cpu() for name, layer in layers.items()}

    def attacked(index: int) -> dict[str, Tensor]:
        prefix = f"{source.blocks}.{index}."
        return {name: merged.get(name, tensor) for name, tensor in tensors.items() if name.startswith(prefix)}

    return attacked
