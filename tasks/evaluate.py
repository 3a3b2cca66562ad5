"""Stage evaluate@X: what a checkpoint is worth, measured on the bytes that ship. The same figures every time."""

import json
from typing import Annotated

import typer

from compression.core.checkpoint import Checkpoint
from compression.core.files import write_text
from compression.core.skeleton import Skeleton
from compression.evaluation.loss import token_losses
from compression.evaluation.size import measure_size
from compression.quantization.packed import block_reader, plain_outer
from tasks.checkpoints import CHECKPOINTS, checkpoint_name
from tasks.core.entry import run_stage
from tasks.core.paths import DATA
from tasks.core.stage import open_stage
from tasks.core.text import CORPORA, corpus_file, read_sequences
from tasks.params.base import read
from tasks.params.evaluate import Evaluate


def main(name: Annotated[str, typer.Argument(callback=checkpoint_name)]) -> None:
    params = read(Evaluate)
    folder = DATA / CHECKPOINTS[name]
    evaluation = [f"evaluation/{file.stem}" for file in sorted((CORPORA / "evaluation").glob("*.safetensors"))]
    roles = [*evaluation, "forget", "control", "retained"]
    output = DATA / "evaluation" / f"{name}.json"
    stage = open_stage(f"evaluate-{name}", output, [folder, *map(corpus_file, roles)], params)

    texts = {
        role: read_sequences(role, params.windows, params.length, "params.yaml: evaluate.windows")
        if role in evaluation
        else read_sequences(role, params.forget_windows, params.forget_length, "params.yaml: evaluate.forget_windows")
        for role in roles
    }
    checkpoint = Checkpoint(folder)
    skeleton = Skeleton(folder, plain_outer(checkpoint), block_reader(checkpoint), stage.device, stage.dtype)
    losses = {role: each.double().mean() for role, each in token_losses(skeleton, texts).items()}
    figures = {
        "checkpoint": name,
        "perplexity": {role.removeprefix("evaluation/"): losses[role].exp().item() for role in evaluation},
        "forget": {
            "loss": losses["forget"].item(),
            "control_loss": losses["control"].item(),
            "tokens": texts["forget"].numel(),
        },
        "retain": {"loss": losses["retained"].item(), "tokens": texts["retained"].numel()},
    } | measure_size(checkpoint)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    run_stage(lambda: typer.run(main))
