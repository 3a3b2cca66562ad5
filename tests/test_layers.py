"""compression <- tasks, and flows apart: no layer looks upward."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# What a layer must never import.
FORBIDDEN = {
    "compression": {"tasks", "flows", "tests", "benchmarks", "dvc", "prefect", "yaml", "typer", "pydantic"},
    "tasks": {"flows", "tests", "benchmarks", "dvc", "prefect"},
    "flows": {"compression", "tasks", "tests", "benchmarks", "torch", "transformers", "safetensors", "numpy"},
}


def imported(file: Path) -> Iterator[str]:
    """Top-level names of all modules that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield (node.module or "").partition(".")[0]


@pytest.mark.parametrize("layer", FORBIDDEN)
def test_layer_looks_down_only(layer: str) -> None:
    files = sorted((ROOT / layer).rglob("*.py"))
    assert files
    upward = {file.name: bad for file in files if (bad := FORBIDDEN[layer] & set(imported(file)))}
    assert not upward


def test_compression_knows_no_paths_of_the_repository() -> None:
    named = [
        file.relative_to(ROOT).as_posix()
        for file in (ROOT / "compression").rglob("*.py")
        if any(
            isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith(("data/", ".work"))
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        )
    ]
    assert not named


def test_no_pickles_and_no_remote_code() -> None:
    for layer in FORBIDDEN:
        for file in (ROOT / layer).rglob("*.py"):
            text = file.read_text(encoding="utf-8")
            for unsafe in ("import pickle", "torch.load(", "torch.save(", "trust_remote_code=True", "shell=True"):
                assert unsafe not in text, f"{file.relative_to(ROOT)} uses {unsafe}"
