"""Retrains a few parameters of a pruned model and writes it back, mask kept."""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from compression.core.checkpoint import Checkpoint, CheckpointWriter
from compression.core.errors import Problem
from compression.core.journal import Journal
from compression.training.loop import Recipe, train
from compression.training.text import Shuffled, next_token_loss
from compression.training.whole import load_whole, read_whole, write_whole


def retrain_model(
    source: Checkpoint,
    writer: CheckpointWriter,
    journal: Journal,
    method: ModuleType,
    options: Mapping[str, Any],
    recipe: Recipe,
    ids: Tensor,
    sequences: int,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Trains on next-token loss, merges, and writes every block; masks are proven as it writes.

    Args:
        method: a module of compression.retraining.METHODS.
        options: its own settings; `seed` also draws the sequences.
        ids: training text int64 [N, T].
        sequences: a step.
        dtype: of the forward and backward pass. Weights are written in the type in which they are stored.

    Returns:
        trainable_parameters, trainable_share (of all parameters), losses by step, stopped, and merge_jump: by how
        much the merge raised the loss of the first step's sequences, in nats; zero where adapters merge exactly.

    Raises:
        Problem: nothing to train; a loss that is not finite; a pruned weight that is not zero any more.
    """
    tensors, keep = read_whole(source, "load")
    stored = {name: tensor.dtype for name, tensor in tensors.items()}
    working = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    model = load_whole(source.folder, working, device)
    total = sum(tensor.numel() for tensor in tensors.values())
    parameters, merge = method.attach(model, keep, options)
    if not parameters:
        raise Problem(
            "params.yaml: retrain",
            "nothing to train: no biases or norms are asked for (or there are none), and no mask for adapters",
            "set retrain.norms to true, or retrain.method to none",
        )
    draw = Shuffled(ids, sequences, options["seed"])

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        value = next_token_loss(model, draw(step))
        return value, {"loss": value.item()}

    curves, stopped = train(parameters, loss, recipe, journal, "retrain", sequences * ids.shape[1])
    learned = _loss(model, draw(0))
    changed = {name: parameter.detach() for name, parameter in parameters.items() if name in tensors} | merge(tensors)
    jump = _loss(model, draw(0)) - learned
    tensors |= {name: tensor.to("cpu", stored[name]) for name, tensor in changed.items()}
    moved = any(f"{layer}.weight" in changed for layer in source.layers)
    write_whole(source, writer, tensors, keep, {} if moved else source.scales())
    count = sum(parameter.numel() for parameter in parameters.values())
    return {
        "trainable_parameters": count,
        "trainable_share": count / total,
        "losses": curves["loss"],
        "stopped": stopped,
        "merge_jump": jump,
    }


@torch.no_grad()
def _loss(model: nn.Module, ids: Tensor) -> float:
    return next_token_loss(model, ids).item()
