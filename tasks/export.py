"""Stage export: write a checkpoint as files for other programs, each format in a folder of its own."""

import json
from importlib import import_module

from compression.core.checkpoint import Checkpoint
from compression.core.files import write_text
from compression.export import FORMATS
from tasks.core.entry import run_stage
from tasks.core.paths import DATA
from tasks.core.stage import open_stage
from tasks.params.base import read
from tasks.params.export import Export


def main() -> None:
    params = read(Export)
    modules = {name: import_module(FORMATS[name]) for name in params.formats}
    stage = open_stage("export", DATA / "export", [DATA / params.source], params)
    source = Checkpoint(DATA / params.source)
    folder = stage.work / "files"
    folder.mkdir(exist_ok=True)
    figures = {name: module.write(source, folder / name) for name, module in modules.items()}
    manifest = stage.record(params) | {"formats": figures}
    write_text(folder / "manifest.json", json.dumps(manifest, indent=2) + "\n")
    stage.publish(folder)


if __name__ == "__main__":
    run_stage(main)
