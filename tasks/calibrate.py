"""Stage calibrate: activation statistics of the dense model."""

from compression.calibration import input_norms
from compression.core.checkpoint import Checkpoint
from compression.core.files import write_tensors
from compression.core.journal import Journal
from compression.core.skeleton import Skeleton
from tasks.core.entry import run_stage
from tasks.core.paths import DATA
from tasks.core.stage import open_stage
from tasks.core.text import corpus_file, read_sequences
from tasks.params.base import read
from tasks.params.calibrate import Calibrate


def main() -> None:
    params = read(Calibrate)
    stage = open_stage("calibrate", DATA / "calibration", [DATA / "taught", corpus_file("calibration")], params)
    ids = read_sequences("calibration", params.sequences, params.length, "params.yaml: calibrate.sequences")
    model = Checkpoint(DATA / "taught")
    skeleton = Skeleton(model.folder, model.outer(), model.block, stage.device, stage.dtype)
    norms = input_norms(skeleton, ids, Journal(stage.work / "journal"))
    folder = stage.work / "output"
    folder.mkdir(exist_ok=True)
    write_tensors(folder / "input_norms.safetensors", norms)
    stage.publish(folder)


if __name__ == "__main__":
    run_stage(main)
