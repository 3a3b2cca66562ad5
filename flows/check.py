"""The flow's first step: `python -m tasks.check` on params.yaml, with the overrides in it."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from flows import overrides
from flows.errors import Problem


def start(root: Path, params: dict[str, Any], changes: dict[str, Any]) -> "subprocess.Popen[str]":
    """Starts the check; it runs while the graph is read."""
    if not changes:
        return _start(root, root)
    with tempfile.TemporaryDirectory(prefix="pareline-check-") as folder:
        # Written as DVC will write it, so that what the check reads is what the stages will read.
        YAML().dump(overrides.replaced(params, changes), Path(folder, "params.yaml"))
        process = _start(root, Path(folder))
        process.wait()
    return process


def finish(process: "subprocess.Popen[str]") -> None:
    """Waits for the check.

    Raises:
        Problem: params.yaml is at fault; the message is the check's own.
    """
    out, err = process.communicate()
    if process.returncode != 0:
        raise Problem((err or out).strip() or f"the check of params.yaml ended with exit code {process.returncode}")


def _start(root: Path, folder: Path) -> "subprocess.Popen[str]":
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, "-m", "tasks.check"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
