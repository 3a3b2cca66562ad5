"""Stage prune: drop weights block by block, and store the mask."""

from importlib import import_module

import torch

from compression.core.checkpoint import Checkpoint, CheckpointWriter
from compression.core.journal import Journal
from compression.pruning import METHODS
from compression.pruning.method import Settings
from compression.pruning.pattern import make_pattern
from compression.pruning.run import prune_model
from tasks.core.entry import run_stage
from tasks.core.passing import lineage, pass_through
from tasks.core.paths import DATA
from tasks.core.stage import open_stage
from tasks.core.text import corpus_file, read_sequences
from tasks.params.base import read
from tasks.params.prune import Prune


def main() -> None:
    params = read(Prune)
    method = import_module(METHODS[params.method])
    stage = open_stage("prune", DATA / "pruned", [DATA / "model", corpus_file("calibration")], params)
    source = Checkpoint(DATA / "model")
    folder = stage.work / "checkpoint"
    if params.method == "none":
        pass_through(source, folder, stage.record(params))
        return stage.publish(folder)
    if method.STATISTIC is None:
        ids = torch.empty(0, 0, dtype=torch.int64)
    else:
        ids = read_sequences("calibration", params.sequences, params.length, "params.yaml: prune.sequences")
    scope = method.SCOPES[0] if params.scope == "auto" else params.scope
    pattern = make_pattern(params.pattern, params.sparsity, scope)
    writer = CheckpointWriter(folder, source.folder)
    ledger = prune_model(
        source,
        writer,
        Journal(stage.work / "journal"),
        method,
        dict.fromkeys(source.layers, pattern),
        Settings(params.damping, params.columns, params.choose, params.iterations),
        ids,
        stage.device,
        stage.dtype,
    )
    writer.finish(source.depth, lineage(source) | stage.record(params) | {"pruning": ledger})
    stage.publish(folder)


if __name__ == "__main__":
    run_stage(main)
