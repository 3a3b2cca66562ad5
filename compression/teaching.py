"""Teaches a dense model a text by heart, so that there is something to unlearn.

W' = W + s B A on its linears, s = alpha / r (LoRA, arXiv 2106.09685), trained as Gundavarapu et al. teach the book that
they unlearn (arXiv 2405.15152, section on copyrighted text), and merged as it was trained. What they do not say is when
a text is learnt. Here it is once exact memorisation is high enough: the share of its tokens that are the arg max behind
the true tokens before them (Tirumala et al. 2022, arXiv 2205.10770).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from compression.core.checkpoint import Checkpoint, CheckpointWriter
from compression.core.journal import Journal
from compression.training.loop import Curves, Recipe, train
from compression.training.masked_linear import LORA_PRUNE, attach
from compression.training.samples import Samples
from compression.training.text import Shuffled, answer_loss
from compression.training.trained import targeted
from compression.training.whole import load_whole, read_whole, write_whole


def teach_model(
    source: Checkpoint,
    writer: CheckpointWriter,
    journal: Journal,
    options: Mapping[str, Any],
    recipe: Recipe,
    text: Samples,
    other: Samples | None,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Trains low-rank updates until the text is known by heart or all steps are taken, and writes the merged weights.

    Args:
        source: a dense checkpoint.
        options: rank, alpha, targets (patterns of layers that learn; none: all), sequences (a step), mix (the share of
            them that is drawn from `other`), until (exact memorisation that is enough, in (0, 1]), check_every (steps
            from look to look) and seed.
        text: what is to be learnt; its answer tokens count.
        other: text of the same length that keeps the model whole; None if `mix` is 0.
        dtype: of the forward and backward pass. Weights are written in the type in which they are stored.

    Returns:
        trainable_parameters, trainable_share (of all parameters), losses by step in nats a token, memorised (exact
        memorisation before the first step and at every look) and stopped. The values of the best look are kept.

    Raises:
        Problem: a pattern that matches no layer; a loss that is not finite.
    """
    stored, _ = read_whole(source, "load")
    model = load_whole(source.folder, stored, device, dtype)
    # Nothing is pruned: the form without a mask spares a product a layer, and a single True stands for all.
    chosen = targeted(source.layers, options["targets"], "teach.targets")
    every = {layer: torch.ones(()).bool().expand(*chosen[layer]) for layer in chosen}
    layers = attach(model, every, options["rank"], options["alpha"], options["seed"], form=LORA_PRUNE)
    parameters = {f"{name}.{part}": getattr(layer, part) for name, layer in layers.items() for part in "AB"}

    sequences, seed = options["sequences"], options["seed"]
    mixed = round(options["mix"] * sequences)
    draw = Shuffled(torch.arange(len(text.ids)), sequences - mixed, seed)
    draw_other = Shuffled(torch.arange(len(other.ids)), mixed, seed) if other and mixed else None

    def loss(batch: int) -> tuple[Tensor, dict[str, float]]:
        drawn = [text.take(draw(batch))]
        if other and draw_other:
            drawn.append(other.take(draw_other(batch)))
        value = answer_loss(model, Samples(*map(torch.cat, zip(*drawn, strict=True))))
        return value, {"loss": value.item()}

    def memorised() -> float:
        return exact_memorisation(model, text, sequences)

    before = memorised()
    watch = _ByHeart(memorised, options["check_every"], options["until"])
    curves, stopped = train(parameters, loss, recipe, journal, "teach", sequences * text.ids.shape[1], watch=watch)
    stored |= {f"{name}.weight": layer.merged(stored[f"{name}.weight"]).cpu() for name, layer in layers.items()}
    write_whole(source, writer, stored, {}, {})
    count = sum(parameter.numel() for parameter in parameters.values())
    return {
        "trainable_parameters": count,
        "trainable_share": count / sum(tensor.numel() for tensor in stored.values()),
        "losses": curves["loss"],
        "memorised": [before, *curves["memorised"]],
        "stopped": stopped,
    }


class _ByHeart(NamedTuple):
    """Watches exact memorisation, which is enough at `until`."""

    memorised: Callable[[], float]
    every: int
    until: float

    def look(self, curves: Curves) -> tuple[bool, str | None]:
        """As in compression.training.loop.Watcher."""
        looks = curves.setdefault("memorised", [])
        looks.append(self.memorised())
        reached = looks[-1] >= self.until
        return looks[-1] == max(looks), f"exact memorisation reached {self.until:g}" if reached else None


@torch.no_grad()
def exact_memorisation(model: nn.Module, samples: Samples, sequences: int) -> float:
    """Share of the answer tokens that are the arg max behind the true tokens before them.

    Args:
        sequences: how many go through the model at a time.
    """
    device = next(model.parameters()).device
    hits = 0
    for rows in torch.arange(len(samples.ids)).split(sequences):
        ids, answer = (tensor.to(device) for tensor in samples.take(rows))
        told = model(input_ids=ids, use_cache=False).logits[:, :-1].argmax(2)
        hits += int((told == ids[:, 1:])[answer[:, 1:]].sum())
    return hits / int(samples.answer.sum())
