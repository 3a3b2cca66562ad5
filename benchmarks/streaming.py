"""Peak memory of pruning a Llama of 7 billion parameters, and that it does not grow with depth.

    python -m benchmarks.streaming [--depths 8 16 32] [--folder .work/streaming]

Writes a checkpoint of Llama-2-7B's shape with random bfloat16 weights (13.5 GB with all 32 blocks), block by block,
and prunes it by Wanda 2:4 with a short calibration, each depth in a process of its own. Needs 27 GB of disk.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from compression.core.checkpoint import Checkpoint, CheckpointWriter
from compression.core.device import pick_dtype
from compression.core.journal import Journal
from compression.core.skeleton import empty_model, find_blocks, linears
from compression.pruning import wanda
from compression.pruning.method import Settings
from compression.pruning.pattern import NofM
from compression.pruning.run import prune_model

SEQUENCES, LENGTH = 4, 128


def write_model(folder: Path, depth: int) -> None:
    """Random weights of Llama-2-7B's shape, with `depth` blocks, as a block-sharded checkpoint."""
    template = folder.with_name("template")
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=depth,
        num_attention_heads=32,
        vocab_size=32000,
        tie_word_embeddings=False,
    ).save_pretrained(template)
    model = empty_model(template)
    path = find_blocks(model)
    blocks = model.get_submodule(path)
    draw = torch.Generator().manual_seed(0)

    def random(names_and_shapes: list[tuple[str, torch.Size]]) -> dict[str, torch.Tensor]:
        made = {}
        for name, shape in names_and_shapes:
            tensor = torch.empty(shape, dtype=torch.bfloat16)
            made[name] = tensor.fill_(1) if len(shape) == 1 else tensor.normal_(0, 0.02, generator=draw)
        return made

    writer = CheckpointWriter(folder, template)
    everything = [(name, parameter.shape) for name, parameter in model.named_parameters()]
    writer.write_outer(random([entry for entry in everything if not entry[0].startswith(path + ".")]))
    layers: dict[str, list[int]] = {}
    for index, block in enumerate(blocks.children()):
        prefix = f"{path}.{index}"
        writer.write_block(index, random([entry for entry in everything if entry[0].startswith(prefix + ".")]))
        layers |= {name: [layer.out_features, layer.in_features] for name, layer in linears(block, prefix).items()}
    writer.finish(depth, {"blocks": path, "layers": layers})


def prune(folder: Path) -> dict[str, Any]:
    """Prunes the checkpoint in this process."""
    source, device = Checkpoint(folder), torch.device("cpu")
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 32000, (SEQUENCES, LENGTH), generator=draw)
    wall, cpu = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        writer, journal = CheckpointWriter(Path(scratch) / "pruned", folder), Journal(Path(scratch) / "journal")
        patterns = dict.fromkeys(source.layers, NofM(2, 4))
        prune_model(source, writer, journal, wanda, patterns, Settings(), ids, device, pick_dtype("auto", device))
        writer.finish(source.depth, {"blocks": source.blocks, "layers": source.layers})
        size = sum(file.stat().st_size for file in writer.folder.iterdir())
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"depth": source.depth, "bytes": size, "peak_gib": peak, "wall_s": wall, "cpu_s": cpu}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--folder", type=Path, default=Path(".work/streaming"))
    parser.add_argument("--only", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.only:
        print(json.dumps(prune(chosen.only)))
        return
    for depth in chosen.depths:
        folder = chosen.folder / f"llama-{depth}"
        write_model(folder, depth)
        command = [sys.executable, "-m", "benchmarks.streaming", "--only", str(folder)]
        print(
            subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1], flush=True
        )
        shutil.rmtree(chosen.folder)


if __name__ == "__main__":
    main()
