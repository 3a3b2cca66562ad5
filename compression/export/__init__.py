"""Files for other programs: the same weights in a form that transformers is not needed for.

A format is a module with `write(checkpoint: Checkpoint, folder: Path) -> dict[str, Any]`, which writes its files into
the folder, made if need be, and returns the figures that the manifest tells.
"""

FORMATS = {
    "gguf": "compression.export.gguf",
    "compact": "compression.export.compact",
}
