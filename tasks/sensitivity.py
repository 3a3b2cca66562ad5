"""Stage sensitivity: one table, a row per layer."""

from importlib import import_module

import pandas as pd
from torch import Tensor

from compression.core.checkpoint import Checkpoint
from compression.core.files import read_tensors, write_text
from compression.core.journal import Journal
from compression.core.progress import progress
from compression.core.skeleton import Skeleton
from compression.sensitivity import METHODS
from compression.sensitivity.outliers import outlier_ratio
from compression.sensitivity.rounding import Tried, try_widths
from compression.sensitivity.settings import Columns, Settings
from tasks.core.entry import run_stage
from tasks.core.paths import DATA
from tasks.core.stage import Stage, open_stage
from tasks.core.text import corpus_file, read_sequences
from tasks.params.base import read
from tasks.params.sensitivity import Sensitivity

STATISTICS = DATA / "calibration" / "input_norms.safetensors"


def main() -> None:
    params = read(Sensitivity)
    method = import_module(METHODS[params.method])
    inputs = [DATA / "taught", STATISTICS, corpus_file("calibration")]
    stage = open_stage("sensitivity", DATA / "sensitivity", inputs, params)
    model = Checkpoint(DATA / "taught")

    columns: Columns = {}
    if params.method != "none":
        ids = read_sequences("calibration", params.sequences, params.length, "params.yaml: sensitivity.sequences")
        tried = tries(params, model, ids, stage)
        block = model.block if tried is None else tried.block
        skeleton = Skeleton(model.folder, model.outer(), block, stage.device, stage.dtype)
        settings = Settings(
            params.per,
            params.sparsity,
            params.similarity,
            params.components,
            tuple(params.widths),
            params.group_size,
            tried,
            params.curvature,
            params.noise,
        )
        columns = method.measure(skeleton, ids, Journal(stage.work / "journal"), settings)

    table = table_of(model, columns, params.outlier_threshold)
    folder = stage.work / "output"
    folder.mkdir(exist_ok=True)
    write_text(folder / "sensitivity.csv", table.to_csv(index=False))
    stage.publish(folder)


def tries(params: Sensitivity, model: Checkpoint, ids: Tensor, stage: Stage) -> Tried | None:
    """The layers at every width, for measures that try them; None where rounding to nearest on the spot will do."""
    if params.method not in ("tdmpq", "measured") or (params.rounding == "nearest" and params.around is None):
        return None
    return try_widths(
        params.rounding,
        model,
        stage.work / "tried",
        Journal(stage.work / "rounding"),
        ids,
        tuple(params.widths),
        params.group_size,
        params.around,
        stage.device,
        stage.dtype,
    )


def table_of(model: Checkpoint, columns: Columns, threshold: float) -> pd.DataFrame:
    """A row a layer: layer, block, parameters, what was measured, outlier_ratio."""
    norms, rows = read_tensors(STATISTICS), []
    for block in progress(range(model.depth), what="outliers", unit="block"):
        tensors = model.block(block)
        for layer in [name for name in model.layers if f"{name}.weight" in tensors]:
            weight = tensors[f"{layer}.weight"]
            measured = [values[layer] for values in columns.values()]
            ratio = outlier_ratio(weight, norms[layer], threshold)
            rows.append((layer, block, weight.numel(), *measured, ratio))
    return pd.DataFrame(rows, columns=["layer", "block", "parameters", *columns, "outlier_ratio"])


if __name__ == "__main__":
    run_stage(main)
