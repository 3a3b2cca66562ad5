"""Unlearns on the weights that ship: sparse, and on their grid if they are quantised."""

import time
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from compression.core.checkpoint import Checkpoint, CheckpointWriter
from compression.core.errors import Problem
from compression.core.journal import Journal
from compression.quantization.packed import plain_weights
from compression.quantization.scheme import from_manifest
from compression.training.loop import Curves, Figures, Recipe, train
from compression.training.samples import Samples
from compression.training.text import Shuffled
from compression.training.whole import load_whole, read_whole, write_whole
from compression.unlearning.answers import answers_of
from compression.unlearning.draw import Draw, Learner
from compression.unlearning.watch import LOOK, Ceilings, Looks, judged, looked, measured


def unlearn_model(
    source: Checkpoint,
    writer: CheckpointWriter,
    journal: Journal,
    method: ModuleType,
    learns: ModuleType,
    options: Mapping[str, Any],
    recipe: Recipe,
    forget: Samples,
    retain: Samples,
    control: Samples | None,
    refusals: list[list[int]],
    sequences: int,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Trains codes or scales as they will be packed, and writes them; what does not learn is taken over to the byte.

    Masks are proven. Which step is kept, and when training stops, is told in compression.unlearning.watch.

    Args:
        method: a module of compression.unlearning.METHODS.
        learns: one of compression.unlearning.TRAINED.
        options: the objective's own, and: rank, alpha, seed; targets, patterns of the names of layers that are trained,
            none for all; held_out, how many of the last retained rows are looked at and not trained on, and at most how
            many of the first rows of `forget` are looked at; check_every, steps from look to look; forget_ceiling,
            retain_ceiling, kl_ceiling, each a number in nats a token or None; seconds that training may take, or None.
            With that one the written bytes depend on the machine, and a run that was killed starts counting anew.
        forget, retain: as many tokens a row as there may be, also different ones.
        control: like `forget`, but never learned, and not trained on here: once the loss on it is reached, `forget`
            counts as forgotten, whatever `forget_ceiling` is; None: that one counts.
        refusals: token ids, for the objective that prefers them.
        sequences: of each, a step.

    Returns:
        forget_losses, retain_losses and other terms of the objective by step; looks, a list by figure, the first
        before training: step, forget, retain, kl and, if there is such text, control, all losses in nats a token;
        kept_step; stopped; changed_codes, the share of the quantised weights that have left their code (without a grid:
        of weights that moved).

    Raises:
        Problem: too little retained text; a pattern without a layer; or a model that did not survive: nothing is
            written then.
    """
    if len(retain.ids) <= (held_out := options["held_out"]):
        raise Problem(
            "params.yaml: unlearn.held_out",
            f"{held_out} of {len(retain.ids)} retained rows leave nothing to train on",
            f"valid: 1 to {len(retain.ids) - 1}, or more text",
        )
    stored, keep = read_whole(source, "load")
    bits = {layer: scheme.bits for layer, scheme in from_manifest(source.manifest).items()}
    model = load_whole(source.folder, plain_weights(stored, bits), device, dtype)
    parameters, at_start, rewritten = learns.freed(model, source, stored, keep, options)

    learner = Learner(model, at_start)
    forget, retain = forget.to(device), retain.to(device)
    control = control.to(device) if control is not None else None
    learned, watched = retain.take(torch.arange(len(retain.ids) - held_out)), retain.take(torch.arange(-held_out, 0))

    def measure() -> Figures:
        return measured(learner, judged(forget, held_out), watched, control, 2 * sequences)

    ceilings = Ceilings(*(options[f"{name}_ceiling"] for name in Ceilings._fields))
    looks = Looks(measure, measure(), ceilings, options["check_every"], getattr(method, "RISES", True))
    loss = _loss(method, options, learner, forget, learned, refusals, sequences)
    tokens = sequences * (forget.ids.shape[1] + retain.ids.shape[1])
    curves, stopped = train(parameters, loss, recipe, journal, "unlearn", tokens, _clock(options["seconds"]), looks)
    kept = looks.refuse_collapsed(curves)

    changed, shares = rewritten(stored)
    write_whole(source, writer, stored | changed, keep, {})
    by_step: Curves = {"forget": [], "retain": []}
    by_step |= {name: curve for name, curve in curves.items() if not name.startswith(LOOK)}
    taken = max(map(len, by_step.values()))
    at = [min(number * looks.every, taken) for number in range(len(looked(curves)) + 1)]
    figures = [looks.start, *looked(curves)]
    return {
        **{f"{name}_losses": curve for name, curve in by_step.items()},
        "looks": {"step": at} | {name: [each[name] for each in figures] for name in looks.start},
        "kept_step": at[kept + 1],
        "stopped": stopped,
        **shares,
    }


def _loss(
    method: ModuleType,
    options: Mapping[str, Any],
    learner: Learner,
    forget: Samples,
    retain: Samples,
    refusals: list[list[int]],
    sequences: int,
) -> Callable[[int], tuple[Tensor, Figures]]:
    """The objective's loss of a step, by its number."""
    seed = options["seed"]
    of_forget, of_retain = (Shuffled(torch.arange(len(each.ids)), sequences, seed) for each in (forget, retain))
    answers = answers_of(retain)

    def loss(step: int) -> tuple[Tensor, Figures]:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        both = forget.take(of_forget(step)).trimmed(), retain.take(of_retain(step)).trimmed()
        drawn = Draw(*both, learner, answers, refusals, generator)
        value, figures = method.loss(drawn, options)
        return value, figures

    return loss


def _clock(seconds: float | None) -> Callable[[Figures], str | None]:
    """A reason to stop once so many seconds have passed from now on."""
    begun = time.monotonic()
    return lambda _: f"{seconds:g} seconds were up" if seconds and time.monotonic() - begun >= seconds else None
