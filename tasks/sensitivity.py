"""Stage sensitivity: one table, a row per layer."""

from importlib import import_module

import pandas as pd

from compression.core.checkpoint import Checkpoint
from compression.core.files import read_tensors, write_text
from compression.core.journal import Journal
from compression.core.progress import progress
from compression.core.skeleton import Skeleton
from compression.sensitivity import METHODS
from compression.sensitivity.outliers import outlier_ratio
from tasks.core.entry import run_stage
from tasks.core.paths import DATA
from tasks.core.stage import open_stage
from tasks.core.text import corpus_file, read_sequences
from tasks.params.base import read
from tasks.params.sensitivity import Sensitivity

STATISTICS = DATA / "calibration" / "input_norms.safetensors"


def main() -> None:
    params = read(Sensitivity)
    method = import_module(METHODS[params.method])
    inputs = [DATA / "model", STATISTICS, corpus_file("calibration")]
    stage = open_stage("sensitivity", DATA / "sensitivity", inputs, params)
    model = Checkpoint(DATA / "model")

    scores: dict[int, float] = {}
    if params.method != "none":
        ids = read_sequences("calibration", params.sequences, params.length, "params.yaml: sensitivity.sequences")
        skeleton = Skeleton(model.folder, model.outer(), model.block, stage.device, stage.dtype)
        scores = method.measure(skeleton, ids, Journal(stage.work / "journal"), params.sparsity)

    norms = read_tensors(STATISTICS)
    rows = []
    for block in progress(range(model.depth), what="outliers", unit="block"):
        tensors = model.block(block)
        for layer in [name for name in model.layers if f"{name}.weight" in tensors]:
            weight = tensors[f"{layer}.weight"]
            ratio = outlier_ratio(weight, norms[layer], params.outlier_threshold)
            rows.append((layer, block, weight.numel(), scores.get(block), ratio))
    table = pd.DataFrame(rows, columns=["layer", "block", "parameters", "pmpq", "outlier_ratio"])

    folder = stage.work / "output"
    folder.mkdir(exist_ok=True)
    write_text(folder / "sensitivity.csv", table.to_csv(index=False))
    stage.publish(folder)


if __name__ == "__main__":
    run_stage(main)
