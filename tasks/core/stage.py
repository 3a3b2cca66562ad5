"""What every stage does alike: find its journal, publish its output whole, speak plainly when it fails."""

import hashlib
import json
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from compression.core.device import pick_device, pick_dtype
from compression.core.errors import Problem
from compression.core.files import sha256
from tasks.core.paths import ROOT, WORK
from tasks.params.base import Section, read
from tasks.params.compute import Compute


@dataclass(frozen=True)
class Stage:
    """A stage at work.

    Attributes:
        name: as in dvc.yaml.
        output: folder that DVC knows; it appears only when it is whole.
        work: folder of this very computation, outside DVC's outputs: the same inputs, parameters and code
            come back to it after a kill, any others get another one.
        inputs: hash by path, for the manifest.
        device, dtype: where and in which type to calculate.
    """

    name: str
    output: Path
    work: Path
    inputs: dict[str, str]
    device: torch.device
    dtype: torch.dtype

    def record(self, params: Section) -> dict[str, Any]:
        """What the manifest says of how this output came about. No times: equal runs give equal bytes."""
        return {
            "stage": self.name,
            "parameters": params.model_dump(mode="json"),
            "inputs": self.inputs,
            "compute": {"device": self.device.type, "dtype": str(self.dtype).removeprefix("torch.")},
            "versions": versions(),
        }

    def publish(self, folder: Path) -> None:
        """Moves a finished folder to where DVC expects it, and drops the journal."""
        shutil.rmtree(self.output, ignore_errors=True)
        self.output.parent.mkdir(parents=True, exist_ok=True)
        os.replace(folder, self.output)
        shutil.rmtree(self.work, ignore_errors=True)


def open_stage(name: str, output: Path, inputs: list[Path], *sections: Section) -> Stage:
    """Starts a stage: sets threads, finds its work folder.

    Args:
        inputs: files, or checkpoint folders, which their manifest stands for.
        sections: the parameters that it reads.

    Raises:
        Problem: an input is missing, or the device is not there.
    """
    compute = read(Compute)
    device = pick_device(compute.device)
    torch.set_num_threads(compute.threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs a pass over every new tensor
    hashes = {path.as_posix(): _hash(path) for path in inputs}
    described = {
        "inputs": hashes,
        "parameters": [section.model_dump(mode="json") for section in (compute, *sections)],
        "code": _code(),
        "versions": versions(),
    }
    fingerprint = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]
    work = WORK / name / fingerprint
    work.mkdir(parents=True, exist_ok=True)
    for other in work.parent.iterdir():  # a journal of another fingerprint is never used again
        if other != work:
            shutil.rmtree(other)
    return Stage(name, output, work, hashes, device, pick_dtype(compute.dtype, device))


def versions() -> dict[str, str]:
    """Versions of what decides about the bytes."""
    names = ["torch", "transformers", "safetensors", "compressed-tensors", "gguf", "peft", "numpy"]
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def _hash(path: Path) -> str:
    target = path / "manifest.json" if path.is_dir() else path
    if not target.exists():
        raise Problem(str(target), "the input is missing", "run the stage that makes it first, or `dvc repro`")
    return sha256(target)


def _code() -> dict[str, str]:
    """Hash of every module of this project that is loaded by now."""
    files = {Path(file) for module in list(sys.modules.values()) if (file := getattr(module, "__file__", None))}
    mine = sorted(file for file in files if file.is_relative_to(ROOT) and file.suffix == ".py")
    return {file.relative_to(ROOT).as_posix(): sha256(file) for file in mine if ".venv" not in file.parts}
