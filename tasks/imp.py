"""Stage imp@X: a cycle of iterative magnitude pruning, prune and retrain (Han et al. 2015, arXiv 1506.02626)."""

from importlib import import_module
from pathlib import Path

import torch
import typer

from compression.core.checkpoint import Checkpoint, CheckpointWriter
from compression.core.errors import Problem
from compression.core.journal import Journal
from compression.pruning import magnitude
from compression.pruning.method import Settings
from compression.pruning.pattern import Unstructured
from compression.pruning.run import prune_model
from compression.retraining import METHODS
from tasks.core.entry import run_stage
from tasks.core.passing import lineage
from tasks.core.stage import open_stage
from tasks.core.text import corpus_file
from tasks.params.base import PARAMS, read
from tasks.params.imp import Imp, folder
from tasks.retrain import DENSE, retrain


def main(name: str) -> None:
    every = read(Imp)
    if name not in every.cycles:
        valid = ", ".join(every.cycles) or "none is named"
        raise Problem(f"{PARAMS}: imp.cycles", f"there is no cycle `{name}`", f"valid: {valid}")
    params = every.only(name)
    cycle = params.cycles[name]
    method = import_module(METHODS[params.retrain.method])
    origin = Path(cycle.source)
    stage = open_stage(
        f"imp-{name}", Path(folder(name)), [*dict.fromkeys([origin, DENSE]), corpus_file("training")], params
    )
    source = Checkpoint(origin)
    record = stage.record(params)

    pruned = stage.work / "pruned"
    writer = CheckpointWriter(pruned, source.folder)
    prune_model(
        source,
        writer,
        Journal(stage.work / "pruning"),
        magnitude,
        dict.fromkeys(source.layers, Unstructured(cycle.sparsity, "layer")),
        Settings(),
        torch.empty(0, 0, dtype=torch.int64),
        stage.device,
        stage.dtype,
    )
    writer.finish(source.depth, lineage(source) | record)

    retrained = stage.work / "checkpoint"
    retrain(stage, Checkpoint(pruned), retrained, method, params.retrain, record, "imp.retrain")
    stage.publish(retrained)


if __name__ == "__main__":
    run_stage(lambda: typer.run(main))
