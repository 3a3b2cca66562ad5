"""Stage teach: the model that is compressed, which may first learn the text to forget by heart."""

from compression.core.checkpoint import Checkpoint, CheckpointWriter
from compression.core.journal import Journal
from compression.teaching import teach_model
from compression.training.loop import Recipe
from compression.training.samples import Samples
from tasks.core.entry import run_stage
from tasks.core.passing import lineage, pass_through
from tasks.core.paths import DATA
from tasks.core.stage import open_stage
from tasks.core.text import corpus_file, read_samples
from tasks.params.base import read
from tasks.params.teach import Teach


def main() -> None:
    params = read(Teach)
    # What is not read is not named: another text to forget leaves an untaught model as it is.
    texts = [] if params.method == "none" else [corpus_file("forget"), corpus_file("training")]
    stage = open_stage("teach", DATA / "taught", [DATA / "model", *texts], params)
    source = Checkpoint(DATA / "model")
    folder = stage.work / "checkpoint"
    if params.method == "none":
        pass_through(source, folder, stage.record(params))
        return stage.publish(folder)
    writer = CheckpointWriter(folder, source.folder)
    training = teach_model(
        source,
        writer,
        Journal(stage.work / "journal"),
        params.model_dump(),
        Recipe(params.steps, params.learning_rate, params.warmup, params.clip),
        _samples("forget", params),
        _samples("training", params) if params.mix else None,
        stage.device,
        stage.dtype,
    )
    writer.finish(source.depth, lineage(source) | stage.record(params) | {"training": training})
    stage.publish(folder)


def _samples(role: str, params: Teach) -> Samples:
    return read_samples(role, None, params.length, "params.yaml: teach.length")


if __name__ == "__main__":
    run_stage(main)
