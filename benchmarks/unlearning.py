"""Unlearning: objectives side by side, in both orders, under attack.

    make compress ARGS='--params experiments/copyright.yaml'                       # what is unlearned here
    python -m benchmarks.unlearning packed/grad_diff packed/npo+beta=0.1 first/grad_diff --seeds 0 1 2
    python -m benchmarks.unlearning packed/grad_diff --attack relearn requantize --plot .work/unlearning/attacks.svg

An arm is order/objective and settings of section `unlearn`, each behind a +. `packed`: on the quantised checkpoint,
straight through its grid, as the pipeline does it; `first`: on the retrained one, in full precision, which is quantised
afterwards, and is judged before that, too. Each runs the stages as they are, in a folder of its own that has the
workspace's data beside it, and is judged by stage evaluate on the packed bytes. `start/quantized` is what all arms set
out from, `start/dense` the model that was never taught; nothing is unlearned in either. With `--attack` stage attack
goes on: relearning on 4 samples for 10, 50 and 100 steps, rounding anew to 8 and 4 bits, pruning.

recovered: of the exact memorisation that unlearning has taken away, the share that an attack brings back, on samples
that the attacker has not seen. Seconds are those of stage unlearn with its start.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

ROOT = Path.cwd()
LINKS = ("model", "taught", "corpora", "calibration", "sensitivity", "classifier")
ATTACKS = {"relearn": [10, 50, 100], "requantize": [8, 4], "prune": [0.6, 0.7]}
TEXT = YAML(typ="safe", pure=True)


def run_arm(arm: str, seed: int, chosen: argparse.Namespace) -> dict[str, Any]:
    """Runs and judges one arm; figures of stage evaluate, and of stage attack if that is asked for."""
    order, _, rest = arm.partition("/")
    method, *words = rest.split("+")
    settings = {key: TEXT.load(value) for key, _, value in (word.partition("=") for word in words)}
    with tempfile.TemporaryDirectory(dir=chosen.scratch) as scratch:
        place = Path(scratch)
        document = TEXT.load((ROOT / "params.yaml").read_text(encoding="utf-8"))
        document["unlearn"] |= {"seed": seed} if order == "start" else {"method": method, "seed": seed} | settings
        document["attack"] |= {kind: ATTACKS[kind] for kind in chosen.attack} | {"seed": seed}
        lay_out(place, document)
        found: dict[str, Any] = {"arm": arm, "seed": seed}
        if order == "start":
            link(place, "unlearned", ROOT / "data" / {"dense": "model"}.get(method, method))
        elif order == "packed":
            link(place, "quantized", ROOT / "data" / "quantized")
            found |= unlearned(place)
        else:
            link(place, "quantized", ROOT / "data" / "retrained")
            found |= unlearned(place)
            found["before_packing"] = judged(place)
            (place / "data" / "quantized").unlink()
            (place / "data" / "unlearned").rename(place / "data" / "retrained")
            stage(place, "quantize")
            (place / "data" / "quantized").rename(place / "data" / "unlearned")
        return found | judged(place) | (attacked(place) if chosen.attack else {})


def lay_out(place: Path, document: dict[str, Any]) -> None:
    """A workspace with the data that all arms share."""
    (place / "data").mkdir()
    with (place / "params.yaml").open("w", encoding="utf-8") as file:
        TEXT.dump(document, file)
    for name in LINKS:
        if (ROOT / "data" / name).exists():
            link(place, name, ROOT / "data" / name)


def link(place: Path, name: str, target: Path) -> None:
    (place / "data" / name).symlink_to(target.resolve(), target_is_directory=True)


def stage(place: Path, *name: str) -> float:
    """Runs a stage in the workspace; returns its seconds."""
    begun = time.perf_counter()
    module, *arguments = name
    command = [sys.executable, "-m", f"tasks.{module}", *arguments]
    done = subprocess.run(
        command, cwd=place, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    return time.perf_counter() - begun


def unlearned(place: Path) -> dict[str, Any]:
    """What stage unlearn says of itself."""
    seconds = stage(place, "unlearn")
    manifest = json.loads((place / "data" / "unlearned" / "manifest.json").read_text(encoding="utf-8"))
    training = manifest["training"]
    told = ("stopped", "kept_step", "changed_codes", "changed_scales", "looks")
    return {"seconds": seconds} | {key: training[key] for key in told if key in training}


def judged(place: Path) -> dict[str, Any]:
    stage(place, "evaluate", "unlearned")
    figures = json.loads((place / "data" / "evaluation" / "unlearned.json").read_text(encoding="utf-8"))
    return {
        "perplexity": figures["perplexity"],
        "retained_loss": figures["retain"]["loss"],
        "divergence": figures["retain"]["divergence"],
        **{role: figures["memorisation"][role] for role in ("forget", "control")},
        "min_k_20": figures["membership"]["min_k_20"],
        "answers": figures["answers"],
        "harm": figures["harm"],
    }


def attacked(place: Path) -> dict[str, Any]:
    stage(place, "attack")
    points = json.loads((place / "data" / "attack" / "attacks.json").read_text(encoding="utf-8"))
    return {"attacks": [point | {"forget": point["forget"]["exact_memorisation"]} for point in points]}


def recovered(results: list[dict[str, Any]]) -> None:
    """Adds to each attack which share of the forgotten it brings back, given the arm start/quantized of the seed."""
    started = [one for one in results if one["arm"] == "start/quantized" and "attacks" in one]
    before = {one["seed"]: one["attacks"][0]["forget"] for one in started}
    for one in results:
        if one["seed"] in before and "attacks" in one and not one["arm"].startswith("start/"):
            now = one["attacks"][0]["forget"]
            for point in one["attacks"]:
                point["recovered"] = (point["forget"] - now) / (before[one["seed"]] - now)


def plot(results: list[dict[str, Any]], file: Path) -> None:
    """A panel an attack, a line an arm: exact memorisation of the text to forget against the attack's strength."""
    from matplotlib.figure import Figure

    kinds = [kind for kind in ATTACKS if any(point["attack"] == kind for point in results[0]["attacks"])]
    figure = Figure(figsize=(4 * len(kinds), 3.6), layout="constrained")
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for axes, kind in zip(panels, kinds, strict=True):
        for one in results:
            own = [point for point in one["attacks"] if point["attack"] in ("none", kind)]
            ticks = ["as it is", *(f"{point['strength']:g}" for point in own[1:])]
            axes.plot(ticks, [point["forget"] for point in own], marker="o", label=f"{one['arm']}, seed {one['seed']}")
        axes.set_title(kind)
        axes.grid(axis="y")
    panels[0].set_ylabel("exact memorisation, unseen samples")
    panels[-1].legend(fontsize=7)
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="+", metavar="order/objective+setting")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--attack", nargs="+", choices=ATTACKS, default=[])
    parser.add_argument("--scratch", type=Path, default=Path(".work/unlearning"))
    parser.add_argument("--out", type=Path, help="where all results go, as JSON")
    parser.add_argument("--plot", type=Path, help="where the curves of the attacks go")
    chosen = parser.parse_args()
    chosen.scratch.mkdir(parents=True, exist_ok=True)
    results = []
    for seed in chosen.seeds:
        for arm in chosen.arms:
            results.append(run_arm(arm, seed, chosen))
            recovered(results)
            print(json.dumps(results[-1]), flush=True)
    if chosen.out:
        chosen.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    if chosen.plot and chosen.attack:
        plot(results, chosen.plot)


if __name__ == "__main__":
    main()
