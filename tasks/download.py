"""Stage download: fetch the model, verify it, store it block by block."""

from pathlib import Path

from compression.importing import import_model
from tasks.core.entry import run_stage
from tasks.core.paths import DATA
from tasks.core.stage import open_stage
from tasks.params.base import read
from tasks.params.model import Model
from tasks.sources import fetch


def main() -> None:
    params = read(Model)
    stage = open_stage("download", DATA / "model", [], params)
    where = "params.yaml: model.source"
    source: Path = fetch(params.source, params.sha256, where=where)
    folder = stage.work / "checkpoint"
    record = stage.record(params) | {"source": params.source, "licence": params.licence}
    import_model(source, folder, params.dtype, record)
    stage.publish(folder)


if __name__ == "__main__":
    run_stage(main)
