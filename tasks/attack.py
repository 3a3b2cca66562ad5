"""Stage attack: does what was unlearned come back? Nothing waits for it, and by default nothing is tried."""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from compression.attacks import Reader
from compression.attacks.pruning import pruned
from compression.attacks.relearning import relearned
from compression.attacks.requantizing import requantized
from compression.core.checkpoint import Checkpoint
from compression.core.files import write_text
from compression.core.journal import Journal
from compression.core.skeleton import Skeleton
from compression.evaluation.memorisation import memorisation
from compression.quantization.packed import block_reader, plain_outer
from compression.training.loop import Recipe
from compression.training.samples import Samples
from tasks.core.entry import run_stage
from tasks.core.paths import DATA
from tasks.core.stage import Stage, open_stage
from tasks.core.text import corpus_file, read_samples
from tasks.params.attack import Attack
from tasks.params.base import read

ROLES = ("forget", "control", "retained")
WARMUP, CLIP = 0.1, 1.0


class Tried(NamedTuple):
    """An attack, how hard it was (steps, bits, sparsity; 0: not at all), and the weights after it."""

    attack: str
    strength: float
    read: Reader


def main() -> None:
    params = read(Attack)
    stage = open_stage("attack", DATA / "attack", [DATA / "unlearned", *map(corpus_file, ROLES)], params)
    points = attacked(params, stage) if params.relearn + params.requantize + params.prune else []
    folder = stage.work / "figures"
    folder.mkdir(exist_ok=True)
    write_text(folder / "attacks.json", json.dumps(points, indent=2) + "\n")
    write_text(folder / "manifest.json", json.dumps(stage.record(params), indent=2) + "\n")
    stage.publish(folder)


def attacked(params: Attack, stage: Stage) -> list[dict[str, Any]]:
    """What is known of every role after each attack."""
    source = Checkpoint(DATA / "unlearned")
    texts = {
        role: read_samples(role, params.windows, params.length, "params.yaml: attack.windows", params.prompt)
        for role in ("control", "retained")
    }
    # What an attacker knows is no proof that the rest comes back: it is judged on other samples than it learned from.
    both = params.samples + params.windows
    forget = read_samples("forget", both, params.length, "params.yaml: attack.samples", params.prompt)
    known, judged = forget.take(torch.arange(params.samples)), forget.take(torch.arange(params.samples, both))
    texts = {"forget": judged} | texts
    return [
        {"attack": tried.attack, "strength": tried.strength} | figures(source, tried, texts, stage)
        for tried in attacks(source, params, known, stage)
    ]


def attacks(source: Checkpoint, params: Attack, known: Samples, stage: Stage) -> Iterator[Tried]:
    """What the section asks for, each made when its turn comes; the checkpoint as it is, first of all."""
    read = block_reader(source)
    yield Tried("none", 0, read)
    for bits in params.requantize:
        yield Tried("requantize", bits, requantized(read, source.layers, bits, params.group_size))
    for sparsity in params.prune:
        yield Tried("prune", sparsity, pruned(read, source.layers, sparsity))
    for steps in params.relearn:
        recipe = Recipe(steps, params.learning_rate, WARMUP, CLIP)
        journal = Journal(stage.work / f"relearn-{steps}")
        weights = relearned(
            source, known, recipe, params.sequences, params.rank, params.seed, journal, stage.device, stage.dtype
        )
        yield Tried("relearn", steps, weights)


def figures(source: Checkpoint, tried: Tried, texts: dict[str, Samples], stage: Stage) -> dict[str, Any]:
    """The measures of forgetting, by role."""
    skeleton = Skeleton(source.folder, plain_outer(source), tried.read, stage.device, stage.dtype)
    return memorisation(skeleton, texts)


if __name__ == "__main__":
    run_stage(main)
