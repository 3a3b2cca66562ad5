"""Pruning SmolLM2-135M: our stage against the originals' way of doing it, same tokens, one thread each.

    python -m benchmarks.pruning                                  # every arm; hours
    python -m benchmarks.pruning original/wanda ours/wanda        # 50 % unstructured
    python -m benchmarks.pruning ours/alps@0.6 ours/sparsegpt+refit=0@2:4 --sequences 16

An arm is `who/method+setting=value@sparsity-or-pattern`; what is not named is as in params.yaml. It runs in a process
of its own: CPU time is that of pruning alone, with reading and writing the model and without the start of Python and
its libraries. Its model is judged by the protocol: wiki, `--windows` windows of 1024 tokens. Needs data/model and
data/corpora (`dvc repro corpus`). originals.py here stands for the released code; `--peer PYTHON` names the interpreter
of an environment that holds llm-compressor, and its arms are called peer/wanda and peer/sparsegpt.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

DATA = Path("data")
LENGTH = 512
WANTED = ("0.5", "0.6", "0.7", "2:4", "4:8")
ARMS = [
    *(f"original/{method}@{wanted}" for method in ("wanda", "sparsegpt") for wanted in WANTED),
    *(f"ours/{method}@{wanted}" for method in ("wanda", "sparsegpt+refit=0", "sparsegpt", "alps") for wanted in WANTED),
    # Wanda's ablation: whose mask, whether weights are updated, and when the mask is chosen
    *(
        f"ours/{method}{choose}@{wanted}"
        for method in ("magnitude", "wanda")
        for choose in ("", "_obs+refit=0", "_obs+refit=0+choose=columns")
        for wanted in ("0.5", "2:4")
    ),
]


def ours(method: str, wanted: str, ids: Any, folder: Path) -> None:
    import torch

    from compression.core.checkpoint import Checkpoint, CheckpointWriter
    from compression.core.device import pick_dtype
    from compression.core.journal import Journal
    from compression.pruning import METHODS
    from compression.pruning.method import Settings
    from compression.pruning.pattern import make_pattern
    from compression.pruning.run import prune_model
    from tasks.core.passing import lineage
    from tasks.params.base import read
    from tasks.params.prune import Prune

    source, device = Checkpoint(DATA / "model"), torch.device("cpu")
    name, *options = method.split("+")
    module, writer = import_module(METHODS[name]), CheckpointWriter(folder, source.folder)
    params = Prune.model_validate(read(Prune).model_dump() | dict(o.split("=") for o in options), strict=False)
    scope = module.SCOPES[0] if params.scope == "auto" else params.scope
    if ":" in wanted:
        keep, of = map(int, wanted.split(":"))
        pattern = make_pattern(wanted, 1 - keep / of, scope)
    else:
        pattern = make_pattern("unstructured", float(wanted), scope)
    settings = Settings(**params.model_dump(include={field.name for field in fields(Settings)}))
    patterns, journal = dict.fromkeys(source.layers, pattern), Journal(folder.with_name("journal"))
    dtype, passes = pick_dtype("auto", device), params.passes
    prune_model(source, writer, journal, module, patterns, settings, ids, device, dtype, passes)
    writer.finish(source.depth, lineage(source))


def original(method: str, wanted: str, ids: Any, folder: Path) -> None:
    from benchmarks import originals

    originals.prune(DATA / "model", method, wanted, ids, folder)


def run_arm(name: str, sequences: int, windows: int, folder: Path) -> dict[str, Any]:
    """Runs one arm in this process and judges its model."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401  loaded before the clock starts

    from tasks.core.text import read_sequences

    who, _, rest = name.partition("/")
    method, _, wanted = rest.partition("@")
    ids = read_sequences("calibration", sequences, LENGTH, "--sequences")
    torch.set_num_threads(1)
    wall, cpu = time.perf_counter(), time.process_time()
    {"ours": ours, "original": original}[who](method, wanted or "0.5", ids, folder)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"arm": name, "cpu_s": cpu, "wall_s": wall, "peak_mib": peak} | judge(folder, windows)


def judge(folder: Path, windows: int) -> dict[str, Any]:
    """Share of zeros in the blocks' linears, and perplexity in bfloat16, or in float32 where that is faster."""
    import torch
    from transformers import AutoModelForCausalLM

    from compression.core.device import pick_dtype
    from tasks.core.text import read_sequences

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    dtype = pick_dtype("auto", torch.device("cpu"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    weights = [p for n, p in model.model.layers.named_parameters() if p.ndim == 2]
    zeros = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
    losses = []
    with torch.no_grad():
        for row in read_sequences("evaluation/wiki", windows, 1024, "--windows"):
            losses.append(model(input_ids=row[None], labels=row[None]).loss.double())
    return {"zeros": zeros, "wiki_perplexity": torch.stack(losses).mean().exp().item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="*", default=ARMS, metavar="who/method@sparsity")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--peer", type=Path, help="python of an environment with llm-compressor")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    for name in chosen.arms:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "checkpoint"
            if chosen.here:
                result = run_arm(name, chosen.sequences, chosen.windows, folder)
            elif name.startswith("peer/"):
                result = peer(chosen.peer, name, chosen.sequences, chosen.windows, Path(scratch))
            else:
                options = ["--here", "--sequences", str(chosen.sequences), "--windows", str(chosen.windows)]
                result = child([sys.executable, "-m", "benchmarks.pruning", name, *options])
        print(json.dumps(result), flush=True)


def peer(python: Path, name: str, sequences: int, windows: int, scratch: Path) -> dict[str, Any]:
    """An arm of llm-compressor: it is handed the model and the tokens as files, and its model is judged here."""
    from safetensors.torch import save_file

    from tasks.core.text import read_sequences

    save_file({"ids": read_sequences("calibration", sequences, LENGTH, "--sequences")}, scratch / "ids.safetensors")
    method = name.removeprefix("peer/")
    command = [str(python), "benchmarks/llm_compressor.py", method, str(DATA / "model"), str(scratch)]
    return {"arm": name} | child(command) | judge(scratch / "checkpoint", windows)


def child(command: list[str]) -> dict[str, Any]:
    """The last line that a command prints, as JSON."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
