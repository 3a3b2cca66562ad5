"""Quantising SmolLM2-135M: quantisers beside llm-compressor, and plans of bits beside plain rules at equal size.

    python -m benchmarks.quantize ours/rtn ours/gptq+clip+activation peer/gptq --peer PYTHON
    python -m benchmarks.quantize --plans 4.0 --by tdmpq pmpq cmpq measured    # widths 2, 4 and 8
    python -m benchmarks.quantize ours/gptq+clip+activation+bits=4+embeddings=8+asymmetric --source .work/a/checkpoint
    python -m benchmarks.quantize --claim --by tdmpq pmpq cmpq measured

An arm is ours/quantiser and settings, each behind a +: `clip`, `activation` (order of the columns), `asymmetric`,
or key=value of section `quantize` (`tune.steps=40`, too); groups of 64 and 4 bits where nothing else is said. Each runs
in a process of its own, on one thread: CPU time is that of quantising alone, with reading and writing the model and
without the start of Python. The packed model that it writes is what is judged and weighed, all its safetensors, scales
and embedding with them; wiki, `--windows` windows of 1024 tokens. Needs data/model and data/corpora (`dvc repro
corpus`).

`--plans B` measures, for each measure of `--by`, the plan of least cost at B bits on average, and beside it as large
plans: head and tail, five by lot, and uniform if B is a width. `--claim` asks each measure whether the first and the
last 30 % of the blocks are more sensitive than the middle. Tables of sensitivity are made once, and stay in
.work/quantize.

The source of this model is a grid of its own (Q4_1, groups of 32): rows with `group_size=32` flatter us.
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

from benchmarks.pruning import DATA, LENGTH, child, judge

SCRATCH = Path(".work/quantize")
FLAGS = {"clip": {"clip": True}, "activation": {"order": "activation"}, "asymmetric": {"symmetric": False}}
PLAIN = {
    "group_size": 64, "symmetric": True, "clip": False, "order": "natural", "embeddings": None, "plan": "uniform",
    "bits": 4, "widths": [2, 4, 8], "by": "tdmpq",
}  # fmt: skip
ARMS = ["ours/rtn", "ours/rtn+clip", "ours/gptq", "ours/gptq+activation", "ours/gptq+clip+activation"]
LOTS = 5
GROUP = 64  # inputs that share a scale, where costs are measured


def settings_of(arm: str) -> dict[str, Any]:
    """Section `quantize` that an arm stands for."""
    from ruamel.yaml import YAML

    from tasks.params.base import load

    method, *words = arm.removeprefix("ours/").split("+")
    section: dict[str, Any] = load()["quantize"] | PLAIN | {"method": method}
    for word in words:
        key, _, value = word.partition("=")
        name, _, inner = key.partition(".")  # tune.steps=40
        said = YAML(typ="safe", pure=True).load(value)
        section |= FLAGS[word] if word in FLAGS else {name: section[name] | {inner: said} if inner else said}
    return section


def ours(section: dict[str, Any], source: Path, sequences: int, folder: Path, rule: str | None) -> dict[str, Any]:
    """Quantises into `folder`; `rule` is a plan to be compared with (see `plain_rule`), in place of the section's."""
    import pandas as pd
    import torch

    from compression.core.checkpoint import Checkpoint, CheckpointWriter
    from compression.core.device import pick_dtype
    from compression.core.journal import Journal
    from compression.quantization import METHODS
    from compression.quantization.method import Settings
    from compression.quantization.plan import average_bits
    from compression.quantization.run import quantize_model
    from compression.quantization.scheme import anatomy, config_entry, to_manifest
    from tasks.core.passing import lineage
    from tasks.core.text import read_sequences
    from tasks.params.base import read
    from tasks.params.quantize import Quantize
    from tasks.plan import bits_by_layer
    from tasks.quantize import all_schemes, tuned

    params, checkpoint = read(Quantize, {"quantize": section}), Checkpoint(source)
    device = torch.device("cpu")
    dtype = pick_dtype("auto", device)
    table = pd.read_csv(table_file(params.by, params.widths)) if params.ranks and rule is None else None
    bits = bits_by_layer(params, table, checkpoint.layers) if rule is None else plain_rule(rule, params, checkpoint)
    model, ids = anatomy(source), read_sequences("calibration", sequences, LENGTH, "--sequences")
    schemes = all_schemes(params, bits, model.embedding)
    rounded = folder.with_name("rounded") if params.tunes else folder
    writer, entry = CheckpointWriter(rounded, source), config_entry(schemes, model)
    quantize_model(
        checkpoint,
        writer,
        Journal(folder.with_name("journal")),
        import_module(METHODS[params.method]),
        schemes,
        model,
        Settings(params.group_size, params.symmetric, params.clip, params.order, params.damping),
        ids,
        device,
        dtype,
    )
    config = checkpoint.config() | {"quantization_config": entry}
    record = lineage(checkpoint) | {"quantization": to_manifest(schemes)}
    writer.finish(checkpoint.depth, record, config)
    found: dict[str, Any] = {"average_bits": average_bits(bits, checkpoint.layers)}
    if params.tunes:
        dense, journal = Checkpoint(DATA / "model"), Journal(folder.with_name("tuning"))
        training = tuned(Checkpoint(rounded), dense, folder, params.tune, journal, device, dtype, record)
        found |= {"held_out": training["held_out"], "trainable_share": training["trainable_share"]}
    return found


def plain_rule(rule: str, params: Any, checkpoint: Any) -> dict[str, int]:
    """Bits by layer of `head_tail` or `lot:seed`, at the section's average."""
    from compression.quantization import plan
    from compression.quantization.fused import fused_groups

    groups = fused_groups(checkpoint.layers)
    sizes = plan.group_sizes(groups, checkpoint.layers, params.widths)
    budget = params.average_bits * sum(rows * width for rows, width in checkpoint.layers.values())
    if rule.startswith("lot:"):
        found = plan.random_plan(sizes, budget, int(rule.removeprefix("lot:")))
    else:
        blocks = {layer: int(layer.removeprefix(f"{checkpoint.blocks}.").split(".")[0]) for layer in checkpoint.layers}
        found = plan.head_tail(blocks, sizes, budget, min(params.widths), max(params.widths))
    return plan.by_layer(found, checkpoint.layers)


def run_arm(arm: str, source: str, sequences: int, windows: int, folder: str, rule: str | None) -> dict[str, Any]:
    """Runs one arm in this process and judges its model."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401  loaded before the clock starts

    import tasks.quantize  # noqa: F401  likewise

    torch.set_num_threads(1)
    wall, cpu = time.perf_counter(), time.process_time()
    found = ours(settings_of(arm), Path(source), sequences, Path(folder), rule)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return found | {"cpu_s": cpu, "wall_s": wall, "peak_mib": peak} | weigh(Path(folder)) | judge(Path(folder), windows)


def peer(python: Path, source: Path, sequences: int, folder: Path) -> dict[str, Any]:
    """llm-compressor's GPTQ; see quantize_peer.py."""
    tokens, count = DATA / "corpora" / "calibration.safetensors", str(sequences)
    command = [str(python), "benchmarks/quantize_peer.py", str(source), str(tokens), str(folder)]
    return child([*command, "--length", str(LENGTH), "--sequences", count])


def judge_aside(folder: str, windows: int) -> dict[str, Any]:
    return judge(Path(folder), windows)


def weigh(folder: Path) -> dict[str, Any]:
    """Bytes of the weights on disk, all counted but masks, which are not needed to compute."""
    files = [file for file in folder.glob("*.safetensors") if file.name != "masks.safetensors"]
    return {"mb": sum(file.stat().st_size for file in files) / 1e6}


def table_file(by: str, widths: list[int]) -> Path:
    """Where the table of sensitivity by this measure is kept; costs are known for these widths only."""
    return SCRATCH / f"{by}-{'-'.join(map(str, widths))}.csv"


def measure(by: str, sequences: int, length: int, widths: list[int]) -> dict[str, Any]:
    """Makes the table of sensitivity that `by` gives, as stage sensitivity does.

    Costs are those of GPTQ's weights: `measured` around the model that is rounded to the middle width, where plans of
    that many bits lie, group by group; `tdmpq` around the dense one, since its second term needs the whole error.
    """
    import torch

    from compression.core.checkpoint import Checkpoint
    from compression.core.device import pick_dtype
    from compression.core.journal import Journal
    from compression.core.skeleton import Skeleton
    from compression.sensitivity import METHODS
    from compression.sensitivity.rounding import try_widths
    from compression.sensitivity.settings import Settings
    from tasks.core.text import read_sequences
    from tasks.sensitivity import table_of

    model, device = Checkpoint(DATA / "model"), torch.device("cpu")
    ids = read_sequences("calibration", sequences, length, "--sequences")
    per, around = {"tdmpq": ("layer", None), "measured": ("group", sorted(widths)[len(widths) // 2])}.get(
        by, ("block", None)
    )
    SCRATCH.mkdir(parents=True, exist_ok=True)
    cpu, dtype = time.process_time(), pick_dtype("auto", device)
    with tempfile.TemporaryDirectory() as scratch:
        folder, tried, block = Path(scratch), None, model.block
        if by in ("tdmpq", "measured"):
            rounding, tries = Journal(folder / "rounding"), tuple(widths)
            tried = try_widths("gptq", model, folder / "tried", rounding, ids, tries, GROUP, around, device, dtype)
            block = tried.block
        skeleton = Skeleton(model.folder, model.outer(), block, device, dtype)
        settings = Settings(per=per, widths=tuple(widths), group_size=GROUP, tried=tried, curvature="outputs")
        columns = import_module(METHODS[by]).measure(skeleton, ids, Journal(folder / "journal"), settings)
    table_of(model, columns, 5.0).to_csv(table_file(by, widths), index=False)
    return {"by": by, "cpu_s": time.process_time() - cpu}


def claims(names: list[str], widths: list[int]) -> list[dict[str, Any]]:
    """Of each measure: the outer blocks against those in the middle, and rank correlation with what was measured."""
    import pandas as pd

    from compression.sensitivity.claims import outer_blocks_test, spearman

    tables = {by: pd.read_csv(table_file(by, widths)) for by in names}
    scores = {by: table.groupby("block")[by].mean() for by, table in tables.items()}
    found = []
    for by, own in scores.items():
        outer, middle, p = outer_blocks_test(own.to_dict(), seed=0)
        found.append({"by": by, "outer": outer, "middle": middle, "p": p})
        if "measured" in scores and by != "measured":
            correlation = spearman(own.tolist(), scores["measured"].tolist(), seed=0)
            found[-1] |= dict(zip(("rho", "low", "high"), correlation, strict=True))
    return found


ASIDE: dict[str, Callable[..., dict[str, Any]]] = {"run": run_arm, "measure": measure, "judge": judge_aside}


def aside(what: str, **given: Any) -> dict[str, Any]:
    """Does something in a process of its own, whose time and memory are counted for itself."""
    return child([sys.executable, "-m", "benchmarks.quantize", "--aside", what, json.dumps(given, default=str)])


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="*", metavar="who/quantiser+setting")
    parser.add_argument("--source", type=Path, default=DATA / "model", help="checkpoint folder")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--peer", type=Path, help="python of an environment with llm-compressor")
    parser.add_argument("--plans", type=float, metavar="B", help="compare plans at B bits on average")
    parser.add_argument(
        "--with", dest="quantiser", default="ours/gptq+clip+activation", help="what rounds under a plan"
    )
    parser.add_argument("--widths", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--by", nargs="+", default=["tdmpq", "pmpq", "cmpq", "measured"])
    parser.add_argument("--claim", action="store_true", help="are the first and the last blocks more sensitive?")
    parser.add_argument("--measured-on", type=int, nargs=2, default=[16, 512], metavar=("SEQUENCES", "LENGTH"))
    parser.add_argument("--out", type=Path, help="where all results go, as JSON")
    parser.add_argument("--aside", nargs=2, help=argparse.SUPPRESS)
    return parser


def planned(chosen: argparse.Namespace) -> list[tuple[str, str | None]]:
    """Arms of the comparison of plans, each with the plain rule that it follows, if it does."""
    widths = json.dumps(chosen.widths, separators=(",", ":"))
    base = f"{chosen.quantiser}+plan=budget+average_bits={chosen.plans}+widths={widths}"
    arms: list[tuple[str, str | None]] = [(f"{base}+by={by}", None) for by in chosen.by]
    arms += [(base, "head_tail"), *((base, f"lot:{seed}") for seed in range(LOTS))]
    return arms + ([(f"{chosen.quantiser}+bits={chosen.plans:.0f}", None)] if chosen.plans in chosen.widths else [])


def main() -> None:
    parser = arguments()
    chosen = parser.parse_args()
    if chosen.peer is None and any(arm.startswith("peer/") for arm in chosen.arms):
        parser.error("peer arms need --peer")
    if chosen.aside:
        print(json.dumps(ASIDE[chosen.aside[0]](**json.loads(chosen.aside[1]))), flush=True)
        return
    results: list[dict[str, Any]] = []

    def tell(result: dict[str, Any]) -> None:
        print(json.dumps(result), flush=True)
        results.append(result)
        if chosen.out:
            chosen.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")

    if chosen.plans or chosen.claim:
        for by in chosen.by:
            if not table_file(by, chosen.widths).exists():
                # CMPQ compares means over a sequence: many short ones, not few long ones.
                count, length = (512, 128) if by == "cmpq" else chosen.measured_on
                tell(aside("measure", by=by, sequences=count, length=length, widths=chosen.widths))
    if chosen.claim:
        for claim in claims(chosen.by, chosen.widths):
            tell(claim)
    plans = planned(chosen) if chosen.plans else []
    arms = chosen.arms or ([] if plans or chosen.claim else ARMS)
    for arm, rule in [*((arm, None) for arm in arms), *plans]:
        with tempfile.TemporaryDirectory() as scratch:
            folder, sequences, windows = Path(scratch) / "checkpoint", chosen.sequences, chosen.windows
            if arm.startswith("peer/"):
                result = {"arm": arm} | peer(chosen.peer, chosen.source, sequences, folder)
                result |= weigh(folder) | aside("judge", folder=folder, windows=windows)
            else:
                given = {"source": chosen.source, "sequences": sequences, "windows": windows, "folder": folder}
                result = {"arm": arm, "rule": rule} | aside("run", arm=arm, rule=rule, **given)
            tell(result)


if __name__ == "__main__":
    main()
