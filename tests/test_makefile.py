"""The README's commands install once: an environment is known by the hash of the lock file, not by its age."""

import hashlib
import os
import subprocess
from pathlib import Path

import pytest

from tests.imports import ROOT


def planned(home: Path) -> str:
    """What `make test` would run, with its environments in `home`."""
    command = ["make", "--dry-run", "test", f"HOME_OF_VENVS={home}"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def ready(tmp_path: Path) -> Path:
    """The mark of an environment that is whole, older than any checkout."""
    name = hashlib.sha256((ROOT / "requirements.lock").read_bytes()).hexdigest()[:12]
    mark = tmp_path / name / ".ready"
    mark.parent.mkdir()
    mark.touch()
    os.utime(mark, (0, 0))
    return mark


def test_an_environment_that_is_there_is_used(tmp_path: Path, ready: Path) -> None:
    commands = planned(tmp_path)
    assert "pytest" in commands
    assert "pip install" not in commands
    assert "rm -rf" not in commands


def test_one_that_is_half_installed_is_made_anew(tmp_path: Path, ready: Path) -> None:
    ready.unlink()
    assert "pip install" in planned(tmp_path)
