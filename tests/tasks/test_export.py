"""The stage export: what params.yaml names is written, and nothing else."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from compression import export as formats
from compression.core.checkpoint import Checkpoint
from compression.core.errors import Problem
from tasks import export
from tests.conftest import Make
from tests.imports import ROOT


@pytest.fixture
def params(tmp_path: Path, imported: Make, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A workspace with a tiny model where the unlearned one would be: what its params.yaml says."""
    for switch in ("set_num_threads", "use_deterministic_algorithms"):  # they would outlive the test
        monkeypatch.setattr(torch, switch, lambda *_, **__: None)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(imported("llama"), "data/unlearned")
    document: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    document["compute"] = {"device": "cpu", "dtype": "float32", "threads": 1}
    return document


def run(document: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The manifest of what comes out."""
    document["export"] |= changes
    Path("params.yaml").write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    export.main()
    manifest: dict[str, Any] = json.loads(Path("data/export/manifest.json").read_text())
    return manifest


def test_by_default_there_is_a_manifest_and_nothing_else(params: dict[str, Any]) -> None:
    manifest = run(params)
    assert manifest["formats"] == {}
    assert [file.name for file in Path("data/export").iterdir()] == ["manifest.json"]


def test_each_format_has_a_folder_and_its_figures(
    params: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stands_for_gguf.py").write_text(
        "def write(checkpoint, folder):\n"
        "    folder.mkdir()\n"
        "    (folder / 'depth').write_text(str(checkpoint.depth))\n"
        "    return {'bytes': 1}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(formats.FORMATS, "gguf", "stands_for_gguf")
    manifest = run(params, formats=["gguf"])
    assert manifest["formats"] == {"gguf": {"bytes": 1}}
    assert manifest["parameters"] == {"source": "unlearned", "formats": ["gguf"]}
    assert Path("data/export/gguf/depth").read_text() == str(Checkpoint(Path("data/unlearned")).depth)
    assert run(params, formats=[])["formats"] == {}
    assert not Path("data/export/gguf").exists(), "a format that is no longer asked for stayed"


def test_nothing_is_published_when_a_format_fails(params: dict[str, Any]) -> None:
    """The tiny model's tokenizer has a token for each letter, which no GGUF file can say."""
    with pytest.raises(Problem, match="not a tokenizer that GGUF has a name for"):
        run(params, formats=["gguf"])
    assert not Path("data/export").exists()


def test_a_missing_checkpoint_is_named(params: dict[str, Any]) -> None:
    with pytest.raises(Problem, match=r"data/quantized: the input is missing|data/quantized/manifest"):
        run(params, source="quantized")
