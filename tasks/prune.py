"""Stage prune: drop weights block by block, and store the mask."""

from importlib import import_module
from pathlib import Path

import pandas as pd
import torch

from compression.core.checkpoint import Checkpoint, CheckpointWriter
from compression.core.errors import Problem
from compression.core.journal import Journal
from compression.pruning import METHODS
from compression.pruning.allocation import layer_pattern
from compression.pruning.method import Settings
from compression.pruning.pattern import Pattern, make_pattern
from compression.pruning.run import prune_model
from tasks.core.entry import run_stage
from tasks.core.passing import lineage, pass_through
from tasks.core.paths import DATA
from tasks.core.stage import open_stage
from tasks.core.text import corpus_file, read_sequences
from tasks.params.base import read
from tasks.params.prune import Prune

ALLOCATION = DATA / "allocation" / "allocation.csv"


def main() -> None:
    params = read(Prune)
    method = import_module(METHODS[params.method])
    inputs = [Path(params.source), corpus_file("calibration"), ALLOCATION]
    stage = open_stage("prune", DATA / "pruned", inputs, params)
    source = Checkpoint(Path(params.source))
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
        _patterns(pattern, source),
        Settings(params.damping, params.columns, params.choose, params.iterations, params.bits, params.group_size),
        ids,
        stage.device,
        stage.dtype,
    )
    writer.finish(source.depth, lineage(source) | stage.record(params) | {"pruning": ledger})
    stage.publish(folder)


def _patterns(pattern: Pattern, source: Checkpoint) -> dict[str, Pattern]:
    """The pattern of each layer, as stage allocate has dealt them out."""
    table = pd.read_csv(ALLOCATION, index_col="layer")
    if list(table.index) != list(source.layers):
        raise Problem(str(ALLOCATION), "is not about the layers of this model", "run stage allocate again")
    return {
        layer: layer_pattern(pattern, int(dropped), int(weights))
        for layer, dropped, weights in zip(table.index, table["dropped"], table["weights"], strict=True)
    }


if __name__ == "__main__":
    run_stage(main)
