"""The six checkpoints of the chain."""

import typer

from tasks.params.base import nearest

# name in reports -> folder below data/
CHECKPOINTS = {
    "dense": "model",
    "taught": "taught",
    "pruned": "pruned",
    "retrained": "retrained",
    "quantized": "quantized",
    "unlearned": "unlearned",
}


def checkpoint_name(name: str) -> str:
    """Refuses a name that is none of the six."""
    if name not in CHECKPOINTS:
        raise typer.BadParameter(f"there is no checkpoint `{name}`; {nearest(name, list(CHECKPOINTS))}")
    return name
