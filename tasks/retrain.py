"""Stage retrain: PERP, a few parameters learn and the mask stays."""

from importlib import import_module

from compression.core.checkpoint import Checkpoint, CheckpointWriter
from compression.core.journal import Journal
from compression.retraining import METHODS
from compression.retraining.run import retrain_model
from compression.training.loop import Recipe
from tasks.core.entry import run_stage
from tasks.core.passing import lineage, pass_through
from tasks.core.paths import DATA
from tasks.core.stage import open_stage
from tasks.core.text import corpus_file, read_sequences
from tasks.params.base import read
from tasks.params.retrain import Retrain


def main() -> None:
    params = read(Retrain)
    method = import_module(METHODS[params.method])
    stage = open_stage("retrain", DATA / "retrained", [DATA / "pruned", corpus_file("training")], params)
    source = Checkpoint(DATA / "pruned")
    folder = stage.work / "checkpoint"
    if params.method == "none":
        pass_through(source, folder, stage.record(params))
        return stage.publish(folder)
    writer = CheckpointWriter(folder, source.folder)
    training = retrain_model(
        source,
        writer,
        Journal(stage.work / "journal"),
        method,
        params.model_dump(include={"rank", "alpha", "biases", "norms", "seed"}),
        Recipe(params.steps, params.learning_rate, params.warmup, params.clip),
        read_sequences("training", None, params.length, "params.yaml: retrain.length"),
        params.sequences,
        stage.device,
        stage.dtype,
    )
    writer.finish(source.depth, lineage(source) | stage.record(params) | {"training": training})
    stage.publish(folder)


if __name__ == "__main__":
    run_stage(main)
