"""Layer-wise reconstruction: each pruned block learns to give what the dense one gives (PERP, arXiv 2312.15230).

    X_0 = embeddings
    Y_i = dense block_i(X_i)                         what block i would have given had it not been pruned
    minimise  mean (pruned block_i(X_i) - Y_i)^2     over the few parameters, then merge
    X_i+1 = pruned block_i(X_i)                      with the weights that are written

`half_block` gives attention and the rest of the block a target each (Free Lunch, arXiv 2510.14444). The rest learns
while the attention, which has learned already, is stood in for by its output. A parameter learns in the half that it
affects first, so a norm before the attention belongs to it.

One block is in memory, and X and Y [N, T, d] in the computing type (with `half_block` the attention's output as well).
"""

import json
import math
import shutil
from collections.abc import Mapping
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from compression.core.checkpoint import Checkpoint, CheckpointWriter
from compression.core.errors import Problem
from compression.core.journal import Journal
from compression.core.memory import tidy
from compression.core.progress import progress
from compression.retraining.parameters import targeted
from compression.retraining.parts import Part, Walk, find_parts, owner
from compression.training.loop import Recipe, train
from compression.training.text import Shuffled

RECORD = "record"  # in the journal: what is known of finished blocks, as JSON


def reconstruct_model(
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
    """Writes the blocks of `source` to `writer`, reconstructed, going on behind the journal's last block.

    A part whose error over all sequences is not below that of the pruned weights keeps these, so no block is worse
    than what it came from.

    Args:
        dense: the model before it was pruned.
        method: a module of compression.retraining.METHODS; it is given a block, and masks by name in the block.
        options: its own settings (`seed` also draws the sequences), head and embeddings false, and objective: `block`
            or `half_block`.
        recipe: of each part. Its clip works on the gradient of the error relative to the target, see below.
        ids: calibration tokens int64 [N, T].
        sequences: a batch.
        dtype: of the forward and backward pass. Weights are written in the type in which they are stored.

    Returns:
        trainable_parameters (of all blocks), trainable_share (of all parameters), losses by step (mean over the parts
        that learned), stopped, merge_jump (by how much the merge raised the error of the first batch, mean over those
        parts; zero where adapters merge exactly), and block_errors: block, part, before, after and learned (false
        where the pruned weights were put back) of each part, in order. Losses and errors are mean squared errors over
        all tokens, relative to the mean square of what the dense block adds to its input, Y - X (for an attention: of
        its output), so that those of early and late blocks compare; 1 is as bad as leaving the block out.

    Raises:
        Problem: a method that keeps its adapter beside the weights, or parameters outside the blocks are asked for;
            the two checkpoints are not of one model; a target that matches no layer; nothing to train in a block; a
            dense block whose output is not finite, or a loss; a pruned weight that is not zero any more.
    """
    if hasattr(method, "save"):
        raise Problem(
            "params.yaml: retrain.objective",
            "an adapter that is not merged does not change the block that the next one gets its input from",
            "set retrain.objective to next_token, or retrain.method to mask_lora",
        )
    if options["head"] or options["embeddings"]:
        raise Problem(
            "params.yaml: retrain.objective",
            "head and embeddings lie outside the blocks, so they cannot be reconstructed",
            "set both to false, or retrain.objective to next_token",
        )
    if (source.depth, list(source.layers)) != (dense.depth, list(dense.layers)):
        raise Problem(
            str(dense.folder),
            f"not the model that {source.folder} was pruned from: it has other layers",
            "give the dense model, or run the stages between the two anew",
        )
    finished, state = journal.load()
    record: dict[str, Any] = json.loads(bytes(state[RECORD].tolist())) if finished else {"parts": [], "parameters": 0}
    packed, scales = source.masks(), source.scales()
    chosen = targeted(packed, options["targets"])
    draw = Shuffled(torch.arange(len(ids)), sequences, options["seed"])
    walk = Walk(source, dense, ids, ids[draw(0)], state.get("hidden"), device, dtype)
    writer.write_outer(source.outer())

    blocks = range(finished, source.depth)
    for index in progress(blocks, what="reconstruct", unit="block", total=source.depth, done=finished):
        prefix = f"{source.blocks}.{index}."
        stored, keep = source.block(index), source.block_masks(index, packed)
        own = {name.removeprefix(prefix): tensor for name, tensor in stored.items()}
        masks = {layer.removeprefix(prefix): mask for layer, mask in keep.items()}
        target_layers = [layer for layer in masks if prefix + layer in chosen]
        learner = _Learner(method, options, recipe, masks, target_layers, draw)
        own_dense = {name.removeprefix(prefix): tensor for name, tensor in dense.block(index).items()}
        own, found = _reconstruct(walk, index, own, own_dense, learner, journal)
        moved = any(part["moved"] for part in found)
        own_scales = {} if moved else {layer: scale for layer, scale in scales.items() if layer in keep}
        writer.write_block(index, {prefix + name: tensor for name, tensor in own.items()}, keep, own_scales)
        record["parts"] += found
        record["parameters"] += sum(tensor.numel() for tensor in own.values())
        encoded = torch.tensor(list(json.dumps(record).encode()), dtype=torch.uint8)
        journal.save(index + 1, {"hidden": walk.hidden.cpu(), RECORD: encoded})
        for folder in journal.folder.glob("block-*"):
            shutil.rmtree(folder)
        tidy(sum(tensor.nbytes for tensor in own.values()))
    return _summary(record, sum(tensor.numel() for tensor in source.outer().values()))


def _summary(record: dict[str, Any], outer: int) -> dict[str, Any]:
    """What is returned; `outer` parameters lie outside the blocks."""
    trained = [part for part in record["parts"] if part["losses"]]
    count = sum(part["trainable"] for part in trained)
    return {
        "trainable_parameters": count,
        "trainable_share": count / (record["parameters"] + outer),
        "losses": [sum(step) / len(step) for step in zip(*(part["losses"] for part in trained), strict=True)],
        "stopped": "all steps taken",
        "merge_jump": sum(part["jump"] for part in trained) / len(trained),
        "block_errors": [
            {key: part[key] for key in ("block", "part", "before", "after", "learned")} for part in record["parts"]
        ],
    }


class _Learner(NamedTuple):
    """How the parts of a block learn.

    Attributes:
        masks: bool [out, in] by layer, all of the block's.
        targets: the layers among them that may have adapters.
        draw: rows of X and Y [sequences] of a batch, by its number.
    """

    method: ModuleType
    options: Mapping[str, Any]
    recipe: Recipe
    masks: dict[str, Tensor]
    targets: list[str]
    draw: Shuffled


def _reconstruct(
    walk: Walk,
    index: int,
    stored: dict[str, Tensor],
    dense: dict[str, Tensor],
    learner: _Learner,
    journal: Journal,
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Reconstructs block `index`, part by part, and takes X through it.

    Args:
        stored, dense: weights of the pruned and of the dense block as they are stored, by name in the block.

    Returns:
        the block's weights, as they are stored, and what is known of each part.
    """
    block = walk.place(index, dense, dense=True)
    one = walk.hidden[: len(walk.batches[0])]
    parts = find_parts(block, lambda: walk.skeleton.run(index, one, walk.batches[0]), learner.options["objective"])
    found: list[dict[str, Any]] = []
    attended: Tensor | None = None
    out = walk.hidden
    for part in parts:
        walk.place(index, dense, dense=True)
        target = walk.outputs(index, part, attended)
        scale = _mean_square(target, None if part.name == "attention" else walk.hidden)
        if not math.isfinite(scale):
            raise Problem(
                f"{walk.skeleton.path}.{index}",
                f"the dense {part.name} gives NaN or infinite values",
                "are the weights up to here sound?",
            )
        # A block that was put in to do nothing adds zero.
        stored, noted, learned = _learn(walk, index, part, stored, target, scale or 1.0, attended, learner, journal)
        found.append(noted)
        if learned is None:
            walk.place(index, stored)
            learned = walk.outputs(index, part, attended)
        if part.name == "attention":
            attended = learned
        out = learned  # of the last part, this is what the block gives
    if not any(noted["losses"] for noted in found):
        raise Problem(
            "params.yaml: retrain",
            f"nothing to train in block {index}: no biases or norms are asked for (or there are none), and no mask for "
            "adapters",
            "set retrain.norms to true, or retrain.method to none",
        )
    walk.hidden = out
    walk.skeleton.release(index)
    return stored, found


def _learn(
    walk: Walk,
    index: int,
    part: Part,
    stored: dict[str, Tensor],
    target: Tensor,
    scale: float,
    attended: Tensor | None,
    learner: _Learner,
    journal: Journal,
) -> tuple[dict[str, Tensor], dict[str, Any], Tensor | None]:
    """Trains one part towards `target` [N, T, d] and merges.

    Returns:
        the block's weights as they are stored, what is known of the part, and what the part now gives [N, T, d]; None
        if that is what it gave before.
    """
    block = walk.place(index, stored)
    before = _mean_square(walk.outputs(index, part, attended), target) / scale
    noted = {"block": index, "part": part.name, "before": before, "after": before, "learned": False}
    linears = {layer: block.get_submodule(layer) for layer in learner.masks}
    # Adapters of layers that are no target, or of the other half, are inert: they are not trained, nor merged.
    options = {**learner.options, "targets": learner.targets if learner.options["targets"] else []}
    parameters, merge = learner.method.attach(block, learner.masks, options)
    learning = {
        name: parameter
        for name, parameter in parameters.items()
        if owner(name) in part.modules and (name in stored or owner(name) in learner.targets)
    }
    for name in parameters.keys() - learning.keys():
        parameters[name].requires_grad_(False)

    def loss(batch: int) -> tuple[Tensor, dict[str, float]]:
        rows = learner.draw(batch).to(target.device)
        out = walk.output(index, part, walk.hidden[rows], walk.drawn, None if attended is None else attended[rows])
        value = F.mse_loss(out.float(), target[rows].float()) / scale
        return value, {"loss": value.item()}

    curve: list[float] = []
    changed: dict[str, Tensor] = {}
    jump = 0.0
    if learning:
        what = f"block {index}" if part.name == "block" else f"block {index} {part.name}"
        own_journal = Journal(journal.folder / f"block-{index:05d}-{part.name}")
        curves, _ = train(learning, loss, learner.recipe, own_journal, what, walk.drawn.numel())
        curve = curves["loss"]
        with torch.no_grad():
            learned = loss(0)[0].item()
            weights = {f"{layer}.weight" for layer in learner.targets if layer in part.modules}
            changed = {name: parameter.detach() for name, parameter in learning.items() if name in stored}
            changed |= {name: tensor for name, tensor in merge(stored).items() if name in weights}
            jump = loss(0)[0].item() - learned
    for layer, linear in linears.items():
        parent, _, child = layer.rpartition(".")
        setattr(block.get_submodule(parent), child, linear)
    noted |= {
        "losses": curve,
        "jump": jump,
        "trainable": sum(parameter.numel() for parameter in learning.values()),
        "moved": any(f"{layer}.weight" in changed for layer in linears),
    }
    if not changed:
        return stored, noted, None
    rounded = stored | {name: tensor.to("cpu", stored[name].dtype) for name, tensor in changed.items()}
    walk.place(index, rounded)
    out = walk.outputs(index, part, attended)
    after = _mean_square(out, target) / scale
    if not after < before:  # a NaN is not below anything
        return stored, noted, None
    return rounded, noted | {"after": after, "learned": True}, out


def _mean_square(one: Tensor, other: Tensor | None) -> float:
    """Mean of (one - other)^2, or of one^2, [N, T, d]; in float32, a sequence at a time."""
    total = 0.0
    for row in range(len(one)):
        difference = one[row].float() if other is None else one[row].float() - other[row].float()
        total += difference.square().mean().item()
    return total / len(one)
