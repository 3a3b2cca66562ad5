"""LLM Surgeon on SmolLM2-135M: our stage against the released code's way of doing it, same tokens, one thread each.

    python -m benchmarks.surgeon                                    # every arm of the protocol, blocks 8-11; hours
    python -m benchmarks.surgeon released/kfac ours/kfac --blocks 8-11 --sparsity 0.3 --shots 3 --every-shot
    python -m benchmarks.surgeon ours/kfac+update=independent ours/kfac+update=none ours/activations ours/identity
    python -m benchmarks.surgeon ours/kfac+pattern=units+heads ours/kfac --blocks all --sparsity 0.2
    python -m benchmarks.surgeon ours/kfac+pattern=units+heads depth/removal+blocks=21-26 --blocks all --retrain 30
    python -m benchmarks.surgeon ours/kfac+pattern=2:4 layerwise/wanda+pattern=2:4 --blocks all --sparsity 0.5
    python -m benchmarks.surgeon released/kfac ours/kfac --every-shot --plot .work/surgeon/shots.svg

An arm is `who/curvature` and key=value behind a +: `update` (correlated, independent, none), `pattern` (as in section
`prune`; rows+columns if none is named), `together` (one threshold for all layers; with units and heads a width for
each block, and false if not said), in place of the options of that name `sparsity`, `shots` and `blocks`, and for ours
what section `surgeon` has. `released` prunes rows and columns, correlated or with update none; its code is stood for by
surgeon_released.py. `layerwise/wanda` and `layerwise/sparsegpt` are our pruning stage, of all blocks. The arm
`depth/removal+blocks=21-26` takes these blocks out of the model. With `--retrain STEPS` each model then learns by
MaskLoRA, as stage retrain has it.

Each arm runs in a process of its own and is judged in another: CPU time is that of pruning alone, with reading and
writing the model and without the start of Python. wiki, `--windows` windows of 1024 tokens, in bfloat16. zeros is the
share of the weights of those blocks that are zero or no longer there. Where tensors got smaller, `speed` has bytes and
times of the dense model and of this one, taken in turns in one process (the lower count), and what share was saved;
keys that begin with `blocks_` are of the blocks alone. Needs data/model and data/corpora (`dvc repro corpus`).
"""

import argparse
import json
import re
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from benchmarks.pruning import DATA, child

COUPLED = ("units", "heads", "units+heads", "hidden")  # patterns whose checkpoints get smaller
ROUNDS = 2  # of timing the dense and the smaller model in turns
ARMS = [
    "released/kfac",
    "released/identity+shots=1",
    "ours/kfac",
    "ours/kfac+shots=1",
    "ours/kfac+update=independent",
    "ours/kfac+update=none",
    "ours/activations",
    "ours/identity",
    "ours/identity+shots=1",
]


@dataclass(frozen=True)
class Arm:
    """One run.

    Attributes:
        together: one threshold for all layers; of coupled structures, a width for each block.
        settings: of section `surgeon`, those that have no field here.
    """

    who: str
    curvature: str
    blocks: list[int]
    sparsity: float
    shots: int
    update: str = "correlated"
    pattern: str = "rows+columns"
    together: bool = True
    settings: dict[str, Any] = field(default_factory=dict)


def ours(arm: Arm, ids: Any, folder: Path) -> None:
    """As stage prune does it, from quotas that are made here."""
    import torch

    from compression.core.checkpoint import Checkpoint, CheckpointWriter
    from compression.core.device import pick_dtype
    from compression.pruning.pattern import make_pattern
    from compression.surgeon.curvature import Curvature
    from compression.surgeon.run import prune_by_curvature
    from compression.surgeon.settings import Settings
    from compression.surgeon.way import Task
    from tasks.core.passing import lineage
    from tasks.params.base import load, read
    from tasks.params.surgeon import Surgeon

    document = load()
    document["surgeon"] |= {"curvature": arm.curvature, "update": arm.update, "shots": arm.shots} | arm.settings
    options = read(Surgeon, document)
    curvature = Curvature(
        options.curvature, options.labels, options.samples, options.passes, options.seed, options.weighted
    )
    keys = {"damping_inputs", "damping_outputs", "shots", "update", "correlate", "multiple"}
    settings = Settings(curvature, **options.model_dump(include=keys))
    source, device = Checkpoint(DATA / "model"), torch.device("cpu")
    pattern = make_pattern(arm.pattern, arm.sparsity, "layer")
    task = Task(source, pattern, quotas(arm, source), arm.together, settings)
    writer, work, dtype = CheckpointWriter(folder, source.folder), folder.with_name("shots"), pick_dtype("auto", device)
    shrunk = prune_by_curvature(task, writer, work, ids, device, dtype).shrunk
    record, config = ({"layers": shrunk.layers}, shrunk.config) if shrunk else ({}, None)
    writer.finish(source.depth, lineage(source) | record, config)


def quotas(arm: Arm, source: Any) -> dict[str, Any]:
    """Of each linear: outside the arm's blocks nothing goes, and within them anything may if they go together."""
    from compression.surgeon.way import Quota

    prefixes, found = tuple(f"{source.blocks}.{index}." for index in arm.blocks), {}
    for layer, (rows, width) in source.layers.items():
        dropped = round(arm.sparsity * rows * width) if layer.startswith(prefixes) else 0
        bounds = (0, rows * width) if dropped and arm.together else (dropped, dropped)
        found[layer] = Quota(rows * width, dropped, *bounds)
    return found


def released(arm: Arm, ids: Any, folder: Path) -> None:
    from benchmarks import surgeon_released

    if arm.pattern != "rows+columns" or arm.update == "independent" or not arm.together or arm.settings:
        sys.exit(f"{arm}: of the released code only rows and columns are re-stated, correlated or with update none")
    obd = arm.update == "none" or arm.curvature == "identity"
    surgeon_released.prune(DATA / "model", arm.curvature, ids, folder, arm.blocks, arm.sparsity, arm.shots, obd)


def layerwise(arm: Arm, ids: Any, folder: Path) -> None:
    from benchmarks import pruning

    if len(arm.blocks) != depth():
        sys.exit(f"layerwise/{arm.curvature} prunes all blocks: add --blocks all")
    wanted = arm.pattern if ":" in arm.pattern else str(arm.sparsity)
    pruning.ours(arm.curvature, wanted, ids, folder)


def depth_removal(arm: Arm, ids: Any, folder: Path) -> None:
    """The model without the arm's blocks; what is left has masks, though nothing is masked, so that it can learn."""
    import torch

    from compression.core.checkpoint import Checkpoint, CheckpointWriter
    from tasks.core.passing import lineage

    source, layers = Checkpoint(DATA / "model"), dict[str, list[int]]()
    writer, left = CheckpointWriter(folder, source.folder), set(range(source.depth)) - set(arm.blocks)
    for index, old in enumerate(sorted(left)):
        prefixes = [f"{source.blocks}.{number}." for number in (old, index)]
        tensors = {name.replace(*prefixes): tensor for name, tensor in source.block(old).items()}
        own = {name.replace(*prefixes): shape for name, shape in source.layers.items() if name.startswith(prefixes[0])}
        writer.write_block(index, tensors, {name: torch.ones(*shape, dtype=torch.bool) for name, shape in own.items()})
        layers |= own
    writer.write_outer(source.outer())
    config = source.config() | {"num_hidden_layers": len(left)}
    writer.finish(
        len(left), lineage(source) | {"layers": layers}, {k: v for k, v in config.items() if k != "layer_types"}
    )


def read_arm(text: str, blocks: str, sparsity: float, shots: int) -> Arm:
    """An arm as it is written; see the module's docstring."""
    from ruamel.yaml import YAML

    name, *words = re.split(r"\+(?=\w+=)", text)  # a pattern has a + of its own
    who, _, curvature = name.partition("/")
    given: dict[str, Any] = {"sparsity": sparsity, "shots": shots}
    for word in words:
        key, _, value = word.partition("=")
        given[key] = value if key in ("blocks", "pattern") else YAML(typ="safe", pure=True).load(value)
    given["blocks"] = block_numbers(given.get("blocks", blocks))
    given.setdefault("together", given.get("pattern") not in COUPLED)
    own = {one.name for one in fields(Arm)}
    settings = {key: given.pop(key) for key in set(given) - own}
    return Arm(who, curvature, settings=settings, **given)


def block_numbers(text: str) -> list[int]:
    """`8-11`, `8` or `all`."""
    if text == "all":
        return list(range(depth()))
    first, _, last = text.partition("-")
    return list(range(int(first), int(last or first) + 1))


def depth(folder: Path = DATA / "model") -> int:
    """How many blocks a checkpoint has."""
    from compression.core.checkpoint import Checkpoint

    return Checkpoint(folder).depth


def run(arm: dict[str, Any], sequences: int, length: int, folder: str) -> dict[str, Any]:
    """Runs one arm in this process."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401  loaded before the clock starts

    from tasks.core.text import read_sequences

    chosen = Arm(**arm)
    ids = read_sequences("calibration", sequences, length, "--sequences")
    torch.set_num_threads(1)
    wall, cpu = time.perf_counter(), time.process_time()
    how = {"ours": ours, "released": released, "layerwise": layerwise, "depth": depth_removal}
    how[chosen.who](chosen, ids, Path(folder))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"cpu_s": cpu, "wall_s": wall, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def retrain(folder: str, steps: int) -> dict[str, Any]:
    """Retrains the model in `folder` into `folder`-retrained."""
    from benchmarks import perp

    target, length = Path(f"{folder}-retrained"), perp.LENGTH
    usual: dict[str, Any] = {
        "sequences": 2,
        "length": length,
        "learning_rate": None,
        "training": None,
        "texts": None,
        "settings": {},
    }
    done = perp.run_arm(arm="ours/mask_lora", start=folder, folder=str(target), steps=steps, threads=1, **usual)
    return {"retrain_s": done["training_s"]}


def judge(folder: str, blocks: list[int], windows: int) -> dict[str, Any]:
    """What of the blocks' linears is gone, and perplexity as in benchmarks/pruning.py."""
    from benchmarks import pruning

    there, before = nonzeros(Path(folder), blocks)[0], nonzeros(DATA / "model", blocks)[1]
    return {"zeros": 1 - there / before, "wiki_perplexity": pruning.judge(Path(folder), windows)["wiki_perplexity"]}


def nonzeros(folder: Path, blocks: list[int]) -> tuple[int, int]:
    """Weights of the linears in `blocks` that are not zero, and how many there are, zeros with them."""
    from safetensors import safe_open

    prefixes = tuple(f"model.layers.{index}." for index in blocks)
    there = stored = 0
    for file in weight_files(folder):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  it is no mapping
                if name.startswith(prefixes) and (weight := tensors.get_tensor(name)).ndim == 2:
                    there += int((weight != 0).sum())
                    stored += weight.numel()
    return there, stored


def weight_files(folder: Path) -> list[Path]:
    """Files of a model's weights, ours or transformers'; masks and lists of structures are no weights."""
    kinds = ("block-", "outer", "model")
    return sorted(file for file in folder.glob("*.safetensors") if file.name.startswith(kinds))


def speed(folder: str) -> dict[str, Any]:
    """Bytes and times of the dense model and of the one in `folder`, and what share the second saves of each."""
    rounds = [[weigh_and_time(DATA / "model"), weigh_and_time(Path(folder))] for _ in range(ROUNDS)]
    dense, smaller = ({key: min(one[key] for one in own) for key in own[0]} for own in zip(*rounds, strict=True))
    return {
        "speed": {"dense": dense, "smaller": smaller, "saved": {key: 1 - smaller[key] / dense[key] for key in dense}}
    }


def weigh_and_time(folder: Path) -> dict[str, float]:
    """Megabytes on disk; milliseconds of a prompt, and of each token that is generated after it."""
    import torch

    from compression.core.device import pick_dtype
    from compression.evaluation.speed import measure_speed
    from tasks.params.base import read
    from tasks.params.speed import Speed

    torch.set_num_threads(1)
    params, device = read(Speed), torch.device("cpu")
    with BlockTimes(depth(folder)) as blocks:
        dtype = pick_dtype("auto", device)
        figures = measure_speed(folder, params.prefill, params.decode, params.repeats, device, dtype)
    sizes = {file.name: file.stat().st_size / 1e6 for file in weight_files(folder)}
    return {
        "mb": sum(sizes.values()),
        "blocks_mb": sum(size for name, size in sizes.items() if name.startswith("block-")),
        "prefill_ms": 1e3 * params.prefill / figures["prefill_tokens_per_second"],
        "blocks_prefill_ms": 1e3 * blocks.median(params.prefill),
        "decode_ms": 1e3 / figures["decode_tokens_per_second"],
        "blocks_decode_ms": 1e3 * blocks.median(1),
    }


class BlockTimes:
    """While entered, takes down the seconds that every block of a Llama takes, by the tokens that it is given."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks

    def __enter__(self) -> "BlockTimes":
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer

        self.seconds: dict[int, list[float]] = {}
        self.block, self.forward = LlamaDecoderLayer, LlamaDecoderLayer.forward

        def timed(block: Any, hidden: Any, *given: Any, **named: Any) -> Any:
            began = time.perf_counter()
            states = self.forward(block, hidden, *given, **named)
            self.seconds.setdefault(hidden.shape[1], []).append(time.perf_counter() - began)
            return states

        self.block.forward = timed
        return self

    def __exit__(self, *_: object) -> None:
        self.block.forward = self.forward

    def median(self, tokens: int) -> float:
        """Seconds that all blocks together take for so many tokens, the median over the passes."""
        seconds, blocks = self.seconds[tokens], self.blocks
        return statistics.median(sum(seconds[start : start + blocks]) for start in range(0, len(seconds), blocks))


def plot(results: list[dict[str, Any]], file: Path) -> None:
    """Perplexity over dense against the share of weights that are gone; a line an arm, a marker a shot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for number, one in enumerate(results):
        points = one.get("by_shot", [one])
        style = "s--" if one["arm"].startswith("released/") else "o-"
        color, label = f"C{number % 10}", f"{one['arm']}, {one['ratio']:.3f}"
        zeros, ratios = [point["zeros"] for point in points], [point["ratio"] for point in points]
        axes.plot([100 * share for share in zeros], ratios, style, color=color, label=label)
    axes.axhline(1, linestyle=":", color="grey", linewidth=1)
    axes.set(yscale="log", xlabel="weights of the pruned blocks that are gone, %", ylabel="wiki perplexity / dense")
    axes.yaxis.set_minor_formatter("{x:.2f}")
    axes.yaxis.set_major_formatter("{x:.2f}")
    axes.legend(fontsize=8)
    figure.savefig(file)


def aside(what: str, given: dict[str, Any]) -> dict[str, Any]:
    """Does something in a process of its own, whose memory is counted for itself."""
    return child([sys.executable, "-m", "benchmarks.surgeon", "--aside", what, json.dumps(given, default=str)])


ASIDE: dict[str, Callable[..., dict[str, Any]]] = {"run": run, "judge": judge, "retrain": retrain, "speed": speed}


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="*", default=ARMS, metavar="who/curvature[+key=value]")
    parser.add_argument("--blocks", default="8-11", help="first-last, one number, or all")
    parser.add_argument("--sparsity", type=float, default=0.3, help="of the linears in these blocks")
    parser.add_argument("--shots", type=int, default=3)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=256, help="of a sequence, in tokens")
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--retrain", type=int, default=0, metavar="STEPS", help="of MaskLoRA, behind the pruning")
    parser.add_argument("--every-shot", action="store_true", help="measure the first shots alone, too")
    parser.add_argument("--out", type=Path, help="where all results go, as JSON")
    parser.add_argument("--plot", type=Path, help="an SVG of perplexity against what is gone")
    parser.add_argument("--aside", nargs=2, help=argparse.SUPPRESS)
    return parser


def measure(arm: Arm, chosen: argparse.Namespace, dense: float) -> dict[str, Any]:
    """Runs and judges one arm."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "checkpoint"
        handed = {"sequences": chosen.sequences, "length": chosen.length, "folder": folder}
        found = aside("run", handed | {"arm": vars(arm)})
        judged = list(range(depth())) if arm.who == "depth" else arm.blocks
        found |= aside("judge", {"folder": folder, "blocks": judged, "windows": chosen.windows})
        if arm.pattern in COUPLED or arm.who == "depth":
            found |= aside("speed", {"folder": folder})
        if chosen.retrain:
            found |= aside("retrain", {"folder": folder, "steps": chosen.retrain})
            learned = aside("judge", {"folder": f"{folder}-retrained", "blocks": [0], "windows": chosen.windows})
            found["retrained_wiki_perplexity"] = learned["wiki_perplexity"]
    return found | {"ratio": found["wiki_perplexity"] / dense}


def by_shot(arm: Arm, last: dict[str, Any], chosen: argparse.Namespace, dense: float) -> list[dict[str, Any]]:
    """What `measure` finds after each shot: the first k of K are all the shots of a run to k / K of the sparsity."""
    shots = range(1, arm.shots)
    shorter = [replace(arm, sparsity=arm.sparsity * shot / arm.shots, shots=shot) for shot in shots]
    return [*(measure(one, chosen, dense) for one in shorter), last]


def main() -> None:
    chosen = arguments().parse_args()
    if chosen.aside:
        print(json.dumps(ASIDE[chosen.aside[0]](**json.loads(chosen.aside[1]))), flush=True)
        return
    given = {"folder": DATA / "model", "blocks": block_numbers(chosen.blocks), "windows": chosen.windows}
    dense = aside("judge", given)
    results: list[dict[str, Any]] = []
    for text in chosen.arms:
        arm = read_arm(text, chosen.blocks, chosen.sparsity, chosen.shots)
        what = {"arm": text, "blocks": len(arm.blocks), "sparsity": arm.sparsity, "shots": arm.shots}
        found = measure(arm, chosen, dense["wiki_perplexity"])
        shots = by_shot(arm, found, chosen, dense["wiki_perplexity"]) if chosen.every_shot and arm.shots > 1 else None
        results.append(what | found | ({"by_shot": shots} if shots else {}))
        print(json.dumps(results[-1]), flush=True)
        if chosen.out:
            chosen.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    if chosen.plot:
        plot(results, chosen.plot)


if __name__ == "__main__":
    main()
