"""Retraining a pruned SmolLM2-135M: our stage against PERP's released way of doing it, same mask, tokens and steps.

    python -m benchmarks.perp                                                  # every arm from magnitude 50 %; hours
    python -m benchmarks.perp released/mask_lora ours/mask_lora --windows 10
    python -m benchmarks.perp released/mask_lora --feed accumulate             # batch 1, gradient checkpointing
    python -m benchmarks.perp ours/full@half_block ours/mask_lora@block --start wanda --sparsity 2:4
    python -m benchmarks.perp ours/mask_lora --steps 30,100 --learning-rate 1e-3 --set rank=32 --set accumulation=2
    python -m benchmarks.perp --out .work/perp/results.json --plot .work/perp/share.svg

An arm is `who/method`, for ours with `@objective` where that is not the next token. Ours takes what is not an option
here from params.yaml, without held-out text and search unless they are `--set`. Each arm runs in a process of its own
and is judged in another by the protocol: wiki, `--windows` windows of 1024 tokens. tokens_per_s is of training alone,
from the making of the optimiser to the last step, without loading, merging and writing (null where blocks learn one
by one); wall_s, cpu_s and peak_mib are of all that, without the start of Python. The pruned model that all arms start
from is made once, by our pruning stage, and stays in .work/perp. Needs data/model and data/corpora (`dvc repro
corpus`). perp_released.py stands for the released code.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.pruning import DATA, LENGTH, child

SCRATCH = Path(".work/perp")
CALIBRATION = 128  # sequences that the starting mask is found with
RATES = {"full": 5e-5}  # as released; 5e-4 for every other method
ARMS = [
    *(f"released/{method}" for method in ("norms", "mask_lora", "scale_lora", "lora_prune", "full")),
    *(f"ours/{method}" for method in ("subset", "mask_lora", "scale_lora", "lora_prune", "full")),
]


def ours(arm: str, start: Path, folder: Path, ids: Any, chosen: dict[str, Any]) -> dict[str, Any]:
    import torch

    from compression.core.checkpoint import Checkpoint, CheckpointWriter
    from compression.core.device import pick_dtype
    from compression.core.journal import Journal
    from compression.retraining import METHODS
    from compression.training.loop import Recipe
    from tasks.core.passing import lineage
    from tasks.params.base import load, read
    from tasks.params.retrain import Retrain
    from tasks.retrain import OBJECTIVES

    method, _, objective = arm.partition("@")
    document = load()
    document["retrain"] |= {
        "method": method,
        "objective": objective or "next_token",
        "steps": chosen["steps"],
        "sequences": chosen["sequences"],
        "length": chosen["length"],
        "learning_rate": chosen["learning_rate"] or RATES.get(method, 5e-4),
        "accumulation": 1,
        "held_out": 0,
        "search": [],
    }
    document["retrain"] |= chosen["settings"]
    params, device, source = read(Retrain, document), torch.device("cpu"), Checkpoint(start)
    writer, function = CheckpointWriter(folder, source.folder), OBJECTIVES[params.objective]
    seconds = time_calls(import_module(function.__module__), "train")
    training = function(
        source,
        Checkpoint(DATA / "model"),
        writer,
        Journal(folder.with_name("journal")),
        import_module(METHODS[method]),
        params.model_dump(),
        Recipe(params.steps, params.learning_rate, params.warmup, params.clip, params.accumulation),
        ids,
        params.sequences,
        device,
        pick_dtype("auto", device),
    )
    writer.finish(source.depth, lineage(source))
    tokens = len(training["losses"]) * params.accumulation * params.sequences * params.length
    whole = {"tokens": tokens} if params.objective == "next_token" else {}
    return training | {"training_s": sum(seconds)} | whole


def time_calls(place: Any, name: str) -> list[float]:
    """Wall times of the calls of a module's function, one after the other as they are made."""
    seconds: list[float] = []
    function: Callable[..., Any] = getattr(place, name)

    def timed(*args: Any, **named: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*args, **named)
        finally:
            seconds.append(time.perf_counter() - began)

    setattr(place, name, timed)
    return seconds


def released(method: str, start: Path, folder: Path, ids: Any, chosen: dict[str, Any]) -> dict[str, Any]:
    from benchmarks import perp_released
    from compression.training.text import Shuffled
    from tasks.params.base import read
    from tasks.params.retrain import Retrain

    held_out = chosen["settings"].get("held_out", 0)
    draw = Shuffled(ids[: len(ids) - held_out], chosen["sequences"], chosen["settings"].get("seed", read(Retrain).seed))
    accumulate, rate = chosen["feed"] == "accumulate", chosen["learning_rate"] or RATES.get(method, 5e-4)
    done = perp_released.retrain(start, method, draw, folder, chosen["steps"], rate, accumulate)
    return done | {"tokens": chosen["steps"] * chosen["sequences"] * chosen["length"]}


def run_arm(**chosen: Any) -> dict[str, Any]:
    """Runs one arm in this process."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401  loaded before the clock starts

    torch.set_num_threads(chosen["threads"])
    torch.manual_seed(0)
    ids = training_text(chosen["training"], chosen["length"])[: chosen["texts"]]
    who, _, arm = chosen["arm"].partition("/")
    wall, cpu = time.perf_counter(), time.process_time()
    done = {"ours": ours, "released": released}[who](arm, Path(chosen["start"]), Path(chosen["folder"]), ids, chosen)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {
        "trainable_percent": 100 * done["trainable_share"],
        "tokens_per_s": done["tokens"] / done["training_s"] if "tokens" in done else None,
        "training_s": done["training_s"],
        "wall_s": wall,
        "cpu_s": cpu,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "loss_first": done["losses"][0],
        "loss_last": done["losses"][-1],
    } | {key: done[key] for key in ("merge_jump", "stopped") if key in done}


def training_text(file: str | None, length: int) -> Any:
    """ids int64 [N, length] of a file's `tokens`; of the training role if there is none."""
    import torch

    from compression.core.files import read_tensors
    from tasks.core.text import read_sequences

    if file is None:
        return read_sequences("training", None, length, "--length")
    tokens = read_tensors(Path(file))["tokens"]
    return tokens[: len(tokens) // length * length].view(-1, length).to(torch.int64)


def judge(folder: str, start: str, windows: int) -> dict[str, Any]:
    """As in benchmarks/pruning.py, and how many weights that the mask of `start` drops are there again.

    An adapter that lies beside the weights is not looked at for zeros, but is for perplexity.
    """
    from transformers import AutoModelForCausalLM

    from benchmarks import pruning
    from compression.core import masks
    from compression.core.checkpoint import Checkpoint

    model, pruned = AutoModelForCausalLM.from_pretrained(folder, dtype="auto"), Checkpoint(Path(start))
    revived = sum(
        masks.revived(model.get_parameter(f"{layer}.weight").data, masks.unpack(bits, pruned.layers[layer][1]))
        for layer, bits in pruned.masks().items()
    )
    found = {"revived": revived} | pruning.judge(Path(folder), windows)
    if not (Path(folder) / "adapter").exists():
        return found
    from peft import PeftModel

    merged = Path(folder).with_name("merged")
    PeftModel.from_pretrained(model, Path(folder) / "adapter").merge_and_unload().save_pretrained(merged)
    return found | {"wiki_perplexity": pruning.judge(merged, windows)["wiki_perplexity"]}


def make_start(method: str, wanted: str) -> Path:
    """Prunes data/model as benchmarks/pruning.py does, unless that has been done before.

    Args:
        wanted: a sparsity, or N:M.
    """
    folder = SCRATCH / f"{method}-{wanted}".replace(":", "of") / "checkpoint"
    if not (folder / "manifest.json").exists():
        aside("prune", {"method": method, "wanted": wanted, "folder": folder})
    return folder


def prune(method: str, wanted: str, folder: str) -> dict[str, Any]:
    from benchmarks import pruning
    from tasks.core.text import read_sequences

    ids = read_sequences("calibration", CALIBRATION, LENGTH, "calibration")
    pruning.ours(method, wanted, ids, Path(folder))
    return {}


def plot(results: list[dict[str, Any]], dense: float, file: Path) -> None:
    """Perplexity against the share of parameters that learn, a marker an arm; ours are labelled on the right."""
    import matplotlib

    matplotlib.use("svg" if file.suffix == ".svg" else "agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    several = len({result["steps"] for result in results}) > 1
    for result in results:
        x, y = result["trainable_percent"], result["wiki_perplexity"]
        marker, side, shift = ("oC0", "left", 6) if result["arm"].startswith("ours/") else ("sC1", "right", -6)
        axes.plot(x, y, marker)
        label = f"{result['arm']}, {result['steps']} steps" if several else result["arm"]
        axes.annotate(label, (x, y), (shift, 0), textcoords="offset points", fontsize=8, ha=side, va="center")
    axes.axhline(dense, linestyle="--", color="grey", linewidth=1, label=f"dense, {dense:.1f}")
    for start, before in {result["start"]: result["wiki_before"] for result in results}.items():
        axes.axhline(before, linestyle=":", color="black", linewidth=1, label=f"pruned ({start}), {before:.1f}")
    axes.set(xscale="log", yscale="log", xlabel="parameters that learn, %", ylabel="wiki perplexity")
    axes.yaxis.set_minor_formatter("{x:.0f}")
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.margins(x=0.3)
    axes.legend(loc="best", fontsize=8)
    figure.savefig(file)


def aside(what: str, given: dict[str, Any]) -> dict[str, Any]:
    """Does something in a process of its own, whose memory is counted for itself."""
    return child([sys.executable, "-m", "benchmarks.perp", "--aside", what, json.dumps(given, default=str)])


ASIDE: dict[str, Callable[..., dict[str, Any]]] = {"prune": prune, "run": run_arm, "judge": judge}


def setting(text: str) -> tuple[str, Any]:
    """key=value, the value as YAML."""
    from ruamel.yaml import YAML

    key, _, value = text.partition("=")
    return key, YAML(typ="safe", pure=True).load(value)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="*", metavar="who/method[@objective]")
    parser.add_argument("--start", choices=("magnitude", "wanda", "sparsegpt", "alps"), default="magnitude")
    parser.add_argument("--sparsity", default="0.5", help="of the start, or N:M")
    parser.add_argument("--steps", default="30", help="one number or several, 30,100: a run each")
    parser.add_argument("--sequences", type=int, default=2, help="a step")
    parser.add_argument("--length", type=int, default=LENGTH, help="of a sequence, in tokens")
    parser.add_argument("--learning-rate", type=float, help="for all arms; by default the released ones")
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--training", help="safetensors file with int `tokens`, instead of the training role")
    parser.add_argument("--texts", type=int, help="only so many sequences of it")
    parser.add_argument("--feed", choices=("batch", "accumulate"), default="batch", help="of the released arms")
    parser.add_argument("--set", action="append", type=setting, default=[], metavar="KEY=VALUE", help="of ours")
    parser.add_argument("--out", type=Path, help="where all results go, as JSON")
    parser.add_argument("--plot", type=Path, help="an SVG of perplexity against the share that learns")
    parser.add_argument("--aside", nargs=2, help=argparse.SUPPRESS)
    return parser


def main() -> None:
    chosen = arguments().parse_args()
    if chosen.aside:
        print(json.dumps(ASIDE[chosen.aside[0]](**json.loads(chosen.aside[1]))), flush=True)
        return
    start, results = make_start(chosen.start, chosen.sparsity), []
    before = aside("judge", {"folder": start, "start": start, "windows": chosen.windows})["wiki_perplexity"]
    handed = ("sequences", "length", "learning_rate", "threads", "training", "texts", "feed")
    common = {key: getattr(chosen, key) for key in handed} | {"start": start, "settings": dict(chosen.set)}
    for steps in map(int, chosen.steps.split(",")):
        for arm in chosen.arms or ARMS:
            result = {"arm": arm, "start": f"{chosen.start} {chosen.sparsity}", "steps": steps, "wiki_before": before}
            if arm.startswith("released/"):
                result["feed"] = chosen.feed
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(scratch) / "checkpoint"
                result |= aside("run", common | {"arm": arm, "steps": steps, "folder": folder})
                result |= aside("judge", {"folder": folder, "start": start, "windows": chosen.windows})
            print(json.dumps(result), flush=True)
            results.append(result)
            if chosen.out:
                chosen.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    if chosen.plot:
        dense = aside("judge", {"folder": DATA / "model", "start": DATA / "model", "windows": chosen.windows})
        plot(results, dense["wiki_perplexity"], chosen.plot)


if __name__ == "__main__":
    main()
