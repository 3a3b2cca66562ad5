"""Stage speed@X: timings of a checkpoint. They differ from run to run, so no other stage but the report reads them."""

import json
from typing import Annotated

import typer

from compression.core.files import write_text
from compression.evaluation.speed import measure_speed
from tasks.checkpoints import CHECKPOINTS, checkpoint_name
from tasks.core.entry import run_stage
from tasks.core.passing import figures_of_dense
from tasks.core.paths import DATA
from tasks.core.stage import open_stage
from tasks.params.base import read
from tasks.params.speed import Speed


def main(name: Annotated[str, typer.Argument(callback=checkpoint_name)]) -> None:
    params = read(Speed)
    folder = DATA / CHECKPOINTS[name]
    output = DATA / "speed" / f"{name}.json"
    if figures_of_dense(name, folder, output):
        return
    stage = open_stage(f"speed-{name}", output, [folder], params)
    figures = measure_speed(folder, params.prefill, params.decode, params.repeats, stage.device, stage.dtype)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, json.dumps({"checkpoint": name} | figures, indent=2) + "\n")


if __name__ == "__main__":
    run_stage(lambda: typer.run(main))
