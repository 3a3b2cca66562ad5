"""Stage retrain: PERP, a few parameters learn and the mask stays."""

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from compression.core.checkpoint import Checkpoint, CheckpointWriter
from compression.core.journal import Journal
from compression.retraining import METHODS
from compression.retraining.reconstruct import reconstruct_model
from compression.retraining.run import retrain_model
from compression.training.loop import Recipe
from compression.training.workers import workers
from tasks.core.entry import run_stage
from tasks.core.launch import launch
from tasks.core.passing import lineage, pass_through
from tasks.core.paths import DATA
from tasks.core.stage import Stage, open_stage
from tasks.core.text import corpus_file, read_sequences
from tasks.params.base import read
from tasks.params.retrain import Retrain

DENSE = DATA / "taught"
OBJECTIVES = {"next_token": retrain_model, "block": reconstruct_model, "half_block": reconstruct_model}


def main() -> None:
    params = read(Retrain)
    method = import_module(METHODS[params.method])
    stage = open_stage("retrain", DATA / "retrained", [DATA / "pruned", DENSE, corpus_file("training")], params)
    if launch(main, params.processes, stage.device, "params.yaml: retrain.processes"):
        return
    folder = stage.work / "checkpoint"
    retrain(stage, Checkpoint(DATA / "pruned"), folder, method, params, stage.record(params), "retrain")
    if workers().first:
        stage.publish(folder)


def retrain(
    stage: Stage,
    source: Checkpoint,
    folder: Path,
    method: ModuleType,
    params: Retrain,
    record: dict[str, Any],
    section: str,
) -> None:
    """Writes `source` to `folder`, retrained as `params` says.

    Args:
        method: the module of `params.method`, loaded before the stage was opened.
        record: what the manifest says beside lineage and training.
        section: where params.yaml has `params`.
    """
    if params.method == "none":
        return pass_through(source, folder, record)
    writer = CheckpointWriter(folder, source.folder)
    training = OBJECTIVES[params.objective](
        source,
        Checkpoint(DENSE),
        writer,
        Journal(stage.work / "journal"),
        method,
        params.model_dump(),
        Recipe(params.steps, params.learning_rate, params.warmup, params.clip, params.accumulation),
        read_sequences("training", None, params.length, f"params.yaml: {section}.length"),
        params.sequences,
        stage.device,
        stage.dtype,
    )
    if workers().first:
        writer.finish(source.depth, lineage(source) | record | {"training": training})


if __name__ == "__main__":
    run_stage(main)
