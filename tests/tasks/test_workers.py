"""Stage retrain in two processes: the same steps as in one, and one clear error when it fails."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from compression.core.checkpoint import Checkpoint
from compression.core.files import write_tensors
from compression.core.masks import revived
from compression.pruning import magnitude
from compression.pruning.pattern import Unstructured
from tests import tiny
from tests.compression.helpers import all_masks, all_tensors, prune
from tests.conftest import Make
from tests.imports import ROOT

CHANGES = {
    "biases": False,
    "rank": 4,
    "alpha": 8,
    "steps": 6,
    "sequences": 2,
    "accumulation": 2,
    "length": tiny.LENGTH,
    "learning_rate": 5e-3,
    "held_out": 4,
    "check_every": 3,
    "search": [1e-3, 5e-3],
    "search_steps": 2,
}


@pytest.fixture
def workspace(tmp_path: Path, imported: Make) -> Path:
    shutil.copytree(imported("llama"), tmp_path / "data/taught")
    nothing = torch.empty(0, 0, dtype=torch.int64)  # magnitude looks at no text
    prune(tmp_path / "data/taught", tmp_path / "data/pruned", magnitude, Unstructured(0.6), nothing)
    text = tiny.encode(tiny.sentences(1, 60)).flatten()
    (tmp_path / "data/corpora").mkdir()
    write_tensors(tmp_path / "data/corpora/training.safetensors", {"tokens": text})
    return tmp_path


def retrain(workspace: Path, **changes: Any) -> "subprocess.CompletedProcess[str]":
    document = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    document["compute"] = {"device": "cpu", "dtype": "float32", "threads": 1}
    document["retrain"] |= CHANGES | changes
    (workspace / "params.yaml").write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    command = [sys.executable, "-m", "tasks.retrain"]
    return subprocess.run(command, cwd=workspace, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)


def test_two_processes_take_the_same_steps_as_one(workspace: Path) -> None:
    found = {}
    for processes in (1, 2):
        done = retrain(workspace, processes=processes)
        assert done.returncode == 0, done.stderr
        retrained = Checkpoint(workspace / "data/retrained")
        found[processes] = retrained.manifest["training"], all_tensors(retrained), all_masks(retrained)
        assert not list((workspace / ".work/retrain").iterdir()), "the journal is dropped once the stage is done"
    (alone, tensors, _), (shared, others, keep) = found[1], found[2]
    for name in ("losses", "held_out"):
        assert shared[name] == pytest.approx(alone[name], rel=1e-4)
    assert shared["searched"] == pytest.approx(alone["searched"], rel=1e-4)
    assert shared["learning_rate"] == alone["learning_rate"]
    for name, tensor in tensors.items():
        torch.testing.assert_close(others[name], tensor, rtol=1e-3, atol=1e-3, msg=name)
    assert all(revived(others[f"{layer}.weight"], mask) == 0 for layer, mask in keep.items())


def test_a_fault_in_several_processes_is_told_plainly(workspace: Path) -> None:
    done = retrain(workspace, processes=2, learning_rate=1e30, search=[])
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert {line for line in done.stderr.splitlines() if line.startswith("error")} != set()
    assert "lower the learning rate" in done.stderr
    assert not (workspace / "data/retrained").exists()
