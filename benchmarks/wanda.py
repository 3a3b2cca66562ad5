"""Wanda 50 % on SmolLM2-135M: our stage against the original's way of doing it, same tokens, one run.

    python -m benchmarks.wanda [--sequences 128] [--windows 40]

Needs data/model and data/corpora (`dvc repro corpus`). Each arm runs in a process of its own with one thread;
CPU time is that of the process, pruning only, start and loading of libraries left out. The original stands here
re-stated from its description: float32, the whole model in memory, one sequence at a time, two passes a block
(collect, then go on with the pruned block), a full sort of every row.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

DATA = Path("data")
SPARSITY = 0.5
LENGTH = 512


def calibration(sequences: int) -> Any:
    from tasks.core.text import read_sequences

    return read_sequences("calibration", sequences, LENGTH, "--sequences")


def ours(sequences: int, folder: Path) -> None:
    import torch

    from compression.core.checkpoint import Checkpoint, CheckpointWriter
    from compression.core.device import pick_dtype
    from compression.core.journal import Journal
    from compression.pruning import wanda
    from compression.pruning.method import Settings
    from compression.pruning.pattern import Unstructured
    from compression.pruning.run import prune_model
    from tasks.core.passing import lineage

    source, device = Checkpoint(DATA / "model"), torch.device("cpu")
    writer = CheckpointWriter(folder, source.folder)
    ids, dtype = calibration(sequences), pick_dtype("auto", device)
    patterns = dict.fromkeys(source.layers, Unstructured(SPARSITY))
    prune_model(source, writer, Journal(folder.with_name("journal")), wanda, patterns, Settings(), ids, device, dtype)
    writer.finish(source.depth, lineage(source))


def original(sequences: int, folder: Path) -> None:
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        DATA / "model", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    rows = calibration(sequences).split(1)
    inputs: list[Any] = []
    arguments: dict[str, Any] = {}

    class Catch(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, hidden: Any, **kwargs: Any) -> None:
            inputs.append(hidden)
            arguments.update(kwargs)
            raise InterruptedError

    blocks = model.model.layers
    blocks[0] = Catch(blocks[0])
    with torch.no_grad():
        for row in rows:
            with suppress(InterruptedError):
                model(row, use_cache=False)
        blocks[0] = blocks[0].block
        for block in blocks:
            layers = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
            squares = {name: torch.zeros(layer.in_features) for name, layer in layers.items()}

            def add(name: str, squares: dict[str, Any] = squares) -> Any:
                def hook(_: nn.Module, given: Any, __: Any) -> None:
                    squares[name] += torch.norm(given[0].reshape(-1, given[0].shape[-1]).t(), dim=1) ** 2 / len(rows)

                return hook

            hooks = [layer.register_forward_hook(add(name)) for name, layer in layers.items()]
            for hidden in inputs:
                block(hidden, **arguments)
            for handle in hooks:
                handle.remove()
            for name, layer in layers.items():
                score = layer.weight.abs() * squares[name].sqrt()
                order = torch.sort(score, dim=-1, stable=True).indices[:, : int(SPARSITY * layer.in_features)]
                layer.weight.scatter_(1, order, 0)
            inputs = [block(hidden, **arguments) for hidden in inputs]
    model.save_pretrained(folder)


def arm(name: str, sequences: int, windows: int, folder: Path) -> dict[str, Any]:
    """Runs one arm in this process and judges its model by the protocol: wiki, windows of 1024 tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    from tasks.core.text import read_sequences

    torch.set_num_threads(1)
    wall, cpu = time.perf_counter(), time.process_time()
    {"ours": ours, "original": original}[name](sequences, folder)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    torch.set_num_threads(2)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    weights = [p for n, p in model.model.layers.named_parameters() if p.ndim == 2]
    zeros = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
    losses = []
    with torch.no_grad():
        for row in read_sequences("evaluation/wiki", windows, 1024, "--windows"):
            losses.append(model(input_ids=row[None], labels=row[None]).loss.double())
    perplexity = torch.stack(losses).mean().exp().item()
    return {"arm": name, "cpu_s": cpu, "wall_s": wall, "peak_mib": peak, "zeros": zeros, "wiki_perplexity": perplexity}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--arm", choices=["ours", "original"])
    chosen = parser.parse_args()
    if chosen.arm:
        with tempfile.TemporaryDirectory() as scratch:
            print(json.dumps(arm(chosen.arm, chosen.sequences, chosen.windows, Path(scratch) / "checkpoint")))
        return
    results = []
    for name in ("original", "ours"):
        command = [sys.executable, "-m", "benchmarks.wanda", "--arm", name]
        command += ["--sequences", str(chosen.sequences), "--windows", str(chosen.windows)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        results.append(json.loads(done.stdout.splitlines()[-1]))
        print(json.dumps(results[-1]), flush=True)
    print(f"CPU time, ours / original: {results[1]['cpu_s'] / results[0]['cpu_s']:.3f}")
    print(f"perplexity, ours / original: {results[1]['wiki_perplexity'] / results[0]['wiki_perplexity']:.4f}")


if __name__ == "__main__":
    main()
