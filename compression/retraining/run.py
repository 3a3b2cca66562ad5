"""Retrains a few parameters of a pruned model on next-token loss and writes it back, mask kept."""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from compression.core.checkpoint import Checkpoint, CheckpointWriter
from compression.core.errors import Problem
from compression.core.journal import Journal
from compression.retraining.search import best_learning_rate
from compression.training.loop import Recipe, Watch, train
from compression.training.text import Shuffled, distillation_loss, next_token_loss
from compression.training.whole import load_whole, read_whole, recompute_blocks, write_whole
from compression.training.workers import summed_figures, workers


def retrain_model(
    source: Checkpoint,
    dense: Checkpoint,
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

    Of several processes the first one writes.

    Args:
        dense: the model before it was pruned, which teaches if there is distillation.
        method: a module of compression.retraining.METHODS.
        options: its own settings (`seed` also draws the sequences), and those of training: checkpointing; distillation,
            the share of the loss that is KL(dense || model); held_out, how many of the last sequences are not trained
            on, and check_every and patience, how they are watched; search and search_steps, see best_learning_rate.
        ids: training text int64 [N, T].
        sequences: a batch.
        dtype: of the forward and backward pass. Weights are written in the type in which they are stored.

    Returns:
        trainable_parameters, trainable_share (of all parameters), losses by step, held_out losses by look, stopped,
        learning_rate, searched (held-out loss by learning rate that was tried), and merge_jump: by how much the merge
        raised the loss of the first batch, in nats; zero where adapters merge exactly.

    Raises:
        Problem: nothing to train; a loss that is not finite; a pruned weight that is not zero any more.
    """
    tensors, keep = read_whole(source, "load")
    stored = {name: tensor.dtype for name, tensor in tensors.items()}
    model = load_whole(source.folder, tensors, device, dtype)
    total = sum(tensor.numel() for tensor in tensors.values())
    parameters, merge = method.attach(model, keep, options)
    if not parameters:
        raise Problem(
            "params.yaml: retrain",
            "nothing to train: no biases or norms are asked for (or there are none), and no mask for adapters",
            "set retrain.norms to true, or retrain.method to none",
        )
    if options["checkpointing"]:
        recompute_blocks(model)
    share = options["distillation"]
    teacher = load_whole(dense.folder, read_whole(dense, "load dense")[0], device, dtype) if share else None
    learned, watched = ids[: len(ids) - options["held_out"]], ids[len(ids) - options["held_out"] :]
    team = workers()
    draw = Shuffled(learned, sequences, options["seed"])

    def loss(batch: int) -> tuple[Tensor, dict[str, float]]:
        chosen = draw(batch)
        value = next_token_loss(model, chosen) if teacher is None else distillation_loss(model, teacher, chosen, share)
        return value, {"loss": value.item()}

    def held_out() -> float:
        own = watched[team.rank :: team.size]
        return summed_figures({"loss": sum(_loss(model, row[None]) for row in own) / len(watched)})["loss"]

    tokens = sequences * ids.shape[1]
    recipe, searched = best_learning_rate(
        parameters, loss, held_out, recipe, options["search"], options["search_steps"], journal, tokens
    )
    watch = Watch(held_out, options["check_every"], options["patience"]) if len(watched) else None
    before = held_out() if watch else None
    curves, stopped = train(parameters, loss, recipe, journal, "retrain", tokens, watch=watch)

    after = _loss(model, draw(0))
    changed = {name: parameter.detach() for name, parameter in parameters.items() if name in tensors} | merge(tensors)
    jump = _loss(model, draw(0)) - after
    tensors |= {name: tensor.to("cpu", stored[name]) for name, tensor in changed.items()}
    moved = any(f"{layer}.weight" in changed for layer in source.layers)
    if team.first:
        write_whole(source, writer, tensors, keep, {} if moved else source.scales())
        if hasattr(method, "save"):
            method.save(writer.folder, parameters, options)
    count = sum(parameter.numel() for parameter in parameters.values())
    return {
        "trainable_parameters": count,
        "trainable_share": count / total,
        "losses": curves["loss"],
        "held_out": [before, *curves["held_out"]] if watch else [],
        "stopped": stopped,
        "learning_rate": recipe.learning_rate,
        "searched": searched,
        "merge_jump": jump,
    }


@torch.no_grad()
def _loss(model: nn.Module, ids: Tensor) -> float:
    return next_token_loss(model, ids).item()
