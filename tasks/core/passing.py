"""What a checkpoint hands on to the next one."""

import json
from pathlib import Path
from typing import Any

from compression.core.checkpoint import MASKS, OUTER, SCALES, Checkpoint, CheckpointWriter, block_file
from compression.core.files import write_text

LINEAGE = ("source", "licence", "blocks", "layers", "quantization")


def lineage(source: Checkpoint) -> dict[str, Any]:
    """What stays true of every checkpoint that comes from `source`."""
    return {key: source.manifest[key] for key in LINEAGE if key in source.manifest}


def figures_of_dense(name: str, folder: Path, output: Path) -> bool:
    """Where nothing was taught, checkpoint `taught` is the dense one, and need not be measured again.

    Returns:
        whether that is so; `output` then says it.
    """
    if name != "taught" or Checkpoint(folder).manifest["parameters"]["method"] != "none":
        return False
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, json.dumps({"checkpoint": name, "same_as": "dense"}, indent=2) + "\n")
    return True


def pass_through(source: Checkpoint, folder: Path, record: dict[str, Any]) -> None:
    """Method `none`: the same checkpoint under the next name, files hard-linked."""
    writer = CheckpointWriter(folder, source.folder)
    names = [OUTER, *(block_file(index) for index in range(source.depth))]
    for name in names + [name for name in (MASKS, SCALES) if name in source.manifest["files"]]:
        writer.link(source, name)
    writer.link_adapter(source)
    writer.finish(source.depth, lineage(source) | record)
