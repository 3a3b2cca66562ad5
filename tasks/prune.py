"""Stage prune: drop weights layer by layer, or structures of the whole model by its curvature, and store the mask."""

from dataclasses import fields
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pandas as pd
import torch
from torch import Tensor

from compression.core.checkpoint import Checkpoint, CheckpointWriter
from compression.core.errors import Problem
from compression.core.journal import Journal
from compression.pruning import METHODS
from compression.pruning.allocation import layer_pattern
from compression.pruning.method import Settings
from compression.pruning.pattern import Pattern, Structured, make_pattern
from compression.pruning.run import prune_model
from compression.surgeon import settings as surgeon
from compression.surgeon.correction import Correction
from compression.surgeon.curvature import Curvature
from compression.surgeon.run import prune_by_curvature
from compression.surgeon.way import Quota, Task
from tasks.core.entry import run_stage
from tasks.core.passing import lineage, pass_through
from tasks.core.paths import DATA
from tasks.core.stage import Stage, open_stage
from tasks.core.text import corpus_file, read_sequences
from tasks.params.base import read
from tasks.params.prune import Prune
from tasks.params.surgeon import Surgeon

ALLOCATION = DATA / "allocation" / "allocation.csv"


def main() -> None:
    params = read(Prune)
    method = import_module(METHODS[params.method])
    inputs = [Path(params.source), corpus_file("calibration"), ALLOCATION]
    own = [read(Surgeon)] if params.method == "surgeon" else []
    stage = open_stage("prune", DATA / "pruned", inputs, params, *own)
    source = Checkpoint(Path(params.source))
    folder = stage.work / "checkpoint"
    if params.method == "none":
        pass_through(source, folder, stage.record(params))
        return stage.publish(folder)
    if params.method == "surgeon":
        _operate(stage, source, folder, params)
    else:
        _prune(stage, source, folder, method, params)
    stage.publish(folder)


def _prune(stage: Stage, source: Checkpoint, folder: Path, method: ModuleType, params: Prune) -> None:
    """Layer by layer."""
    ids = torch.empty(0, 0, dtype=torch.int64) if method.STATISTIC is None else _text(params)
    scope = method.SCOPES[0] if params.scope == "auto" else params.scope
    pattern = make_pattern(params.pattern, params.sparsity, scope)
    if isinstance(pattern, Structured):
        raise Problem("params.yaml: prune.pattern", f"`{params.pattern}` is for method surgeon", "valid: unstructured")
    writer = CheckpointWriter(folder, source.folder)
    ledger = prune_model(
        source,
        writer,
        Journal(stage.work / "journal"),
        method,
        _patterns(pattern, source),
        Settings(**params.model_dump(include={field.name for field in fields(Settings)})),
        ids,
        stage.device,
        stage.dtype,
        params.passes,
    )
    writer.finish(source.depth, lineage(source) | stage.record(params) | {"pruning": ledger})


def _operate(stage: Stage, source: Checkpoint, folder: Path, params: Prune) -> None:
    """The whole model at once."""
    options = read(Surgeon)
    curvature = Curvature(
        options.curvature, options.labels, options.samples, options.passes, options.seed, options.weighted
    )
    learned = options.correction_steps, options.correction_rank, options.correction_learning_rate, options.seed
    correction = Correction(*learned) if options.correction_steps else None
    keys = {"damping_inputs", "damping_outputs", "shots", "update", "correlate", "multiple"}
    settings = surgeon.Settings(curvature, **options.model_dump(include=keys), correction=correction)
    quotas = {layer: Quota(*map(int, row)) for layer, *row in _table(source).itertuples()}
    together = any(quota.least < quota.most for quota in quotas.values())
    pattern = make_pattern(params.pattern, params.sparsity, "layer")
    task = Task(source, pattern, quotas, together, settings)
    writer = CheckpointWriter(folder, source.folder)
    done = prune_by_curvature(task, writer, stage.work / "shots", _text(params), stage.device, stage.dtype)
    record = lineage(source) | stage.record(params) | {"surgeon": options.model_dump(), "pruning": done.ledger}
    record |= {"corrections": done.corrections} if done.corrections else {}
    if done.shrunk is None:
        return writer.finish(source.depth, record)
    shrunk = {"widths": done.shrunk.widths, "padding": done.shrunk.padding, "layers": source.layers}
    writer.finish(source.depth, record | {"layers": done.shrunk.layers, "shrunk": shrunk}, done.shrunk.config)


def _text(params: Prune) -> Tensor:
    return read_sequences("calibration", params.sequences, params.length, "params.yaml: prune.sequences")


def _table(source: Checkpoint) -> pd.DataFrame:
    """What stage allocate has dealt out, by layer: weights, dropped, least, most."""
    table = pd.read_csv(ALLOCATION, index_col="layer")
    if list(table.index) != list(source.layers):
        raise Problem(str(ALLOCATION), "is not about the layers of this model", "run stage allocate again")
    return table[["weights", "dropped", "least", "most"]]


def _patterns(pattern: Pattern, source: Checkpoint) -> dict[str, Pattern]:
    """The pattern of each layer."""
    return {
        layer: layer_pattern(pattern, dropped, weights) for layer, weights, dropped, *_ in _table(source).itertuples()
    }


if __name__ == "__main__":
    run_stage(main)
