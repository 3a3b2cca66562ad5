"""Tunes a quantised model: scales of the grid, norms and biases learn what the dense model gives; codes and mask stay.

Each layer was rounded for itself, and none of them has seen what all of that does to the tokens that come out. The
gradient of the scales is exact, since W' = (q - z) s is linear in s: nothing has to pass through a rounding of codes.
Scales alone are trained by PEQA (Kim et al. 2023, arXiv 2305.14152) and by the end-to-end half of EfficientQAT (Chen et
al. 2024, arXiv 2407.11062); that the dense model is the teacher is from LLM-QAT (Liu et al. 2023, arXiv 2305.17888).
"""

from typing import Any

import torch
from torch import Tensor

from compression.core.checkpoint import Checkpoint, CheckpointWriter
from compression.core.journal import Journal
from compression.quantization.packed import plain_weights
from compression.quantization.scheme import from_manifest
from compression.training import scales
from compression.training.loop import Recipe, Watch, train
from compression.training.text import Shuffled, distillation_loss
from compression.training.whole import load_whole, read_whole, write_whole


def tune_model(
    source: Checkpoint,
    dense: Checkpoint,
    writer: CheckpointWriter,
    journal: Journal,
    recipe: Recipe,
    ids: Tensor,
    sequences: int,
    distillation: float,
    held_out: int,
    check_every: int,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Trains and writes every block; masks are proven. The bytes are as many as they were.

    Args:
        source: quantised.
        dense: the model that teaches.
        ids: training text int64 [N, T].
        sequences: a step.
        distillation: share of the loss that is KL(dense || model); the rest is next-token loss.
        held_out: so many of the last sequences are looked at every `check_every` steps and not trained on; the best
            look is kept, and if it is no better than what training began with, nothing changes. 0: the last step's
            values are kept.
        seed: draws the sequences.

    Returns:
        trainable_parameters and trainable_share (of all parameters); losses by step; held_out, by look, the first
        before training, in nats a token; stopped; changed_scales, the share of scales that have moved.

    Raises:
        Problem: no layer is quantised; a loss that is not finite.
    """
    stored, keep = read_whole(source, "load")
    bits = {layer: scheme.bits for layer, scheme in from_manifest(source.manifest).items()}
    model = load_whole(source.folder, plain_weights(stored, bits), device, dtype)
    original, _ = read_whole(dense, "load dense")
    teacher = load_whole(dense.folder, original, device, dtype)
    parameters, _, rewritten = scales.freed(model, source, stored, keep, {"targets": []})
    learned, watched = ids[: len(ids) - held_out], ids[len(ids) - held_out :]
    draw = Shuffled(learned, sequences, seed)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        value = distillation_loss(model, teacher, draw(step), distillation)
        return value, {"loss": value.item()}

    @torch.no_grad()
    def look() -> float:
        return sum(distillation_loss(model, teacher, row[None], distillation).item() for row in watched) / held_out

    watch = Watch(look, check_every, patience=0) if held_out else None
    looks = [look()] if held_out else []
    curves, stopped = train(parameters, loss, recipe, journal, "tune", sequences * ids.shape[1], watch=watch)
    looks += curves.get("held_out", [])
    if held_out and min(looks[1:]) >= looks[0]:
        tensors, shares = read_whole(source, "load")[0], {"changed_scales": 0.0}  # anew: `stored` has learned, too
    else:
        changed, shares = rewritten(stored)
        tensors = stored | changed
    write_whole(source, writer, tensors, keep, {})
    count = sum(parameter.numel() for parameter in parameters.values())
    return {
        "trainable_parameters": count,
        "trainable_share": count / sum(tensor.numel() for tensor in original.values()),
        "losses": curves["loss"],
        "held_out": looks,
        "stopped": stopped,
        **shares,
    }
