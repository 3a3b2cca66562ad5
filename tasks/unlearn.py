"""Stage unlearn: forget a text on the very weights that ship."""

from importlib import import_module

from compression.core.checkpoint import Checkpoint, CheckpointWriter
from compression.core.journal import Journal
from compression.training.loop import Recipe
from compression.unlearning import METHODS
from compression.unlearning.run import unlearn_model
from tasks.core.entry import run_stage
from tasks.core.passing import lineage, pass_through
from tasks.core.paths import DATA
from tasks.core.stage import open_stage
from tasks.core.text import corpus_file, read_sequences
from tasks.params.base import read
from tasks.params.unlearn import Unlearn


def main() -> None:
    params = read(Unlearn)
    method = import_module(METHODS[params.method])
    inputs = [DATA / "quantized", corpus_file("forget"), corpus_file("training")]
    stage = open_stage("unlearn", DATA / "unlearned", inputs, params)
    source = Checkpoint(DATA / "quantized")
    folder = stage.work / "checkpoint"
    if params.method == "none":
        pass_through(source, folder, stage.record(params))
        return stage.publish(folder)
    writer = CheckpointWriter(folder, source.folder)
    training = unlearn_model(
        source,
        writer,
        Journal(stage.work / "journal"),
        method,
        params.model_dump(exclude={"steps", "learning_rate", "warmup", "clip"}),
        Recipe(params.steps, params.learning_rate, params.warmup, params.clip),
        read_sequences("forget", None, params.length, "params.yaml: unlearn.length"),
        read_sequences("training", None, params.length, "params.yaml: unlearn.length"),
        params.sequences,
        stage.device,
        stage.dtype,
    )
    writer.finish(source.depth, lineage(source) | stage.record(params) | {"training": training})
    stage.publish(folder)


if __name__ == "__main__":
    run_stage(main)
