"""GPU leases, without GPUs: the names are made up, the locks are real."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from flows.lease import lease, visible_gpus
from tests.flows.workspace import ROOT

HOLD = """
import sys, threading
from pathlib import Path
from flows.lease import lease
with lease(["0", "1"], threading.Event(), Path(sys.argv[1])) as held:
    print(held.gpus[0], flush=True)
    sys.stdin.read()
"""


def hold(folder: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def told(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_processes_never_share_a_gpu_and_a_killed_one_frees_it(tmp_path: Path) -> None:
    first, second = hold(tmp_path), hold(tmp_path)
    gpus = {first: told(first), second: told(second)}
    third = hold(tmp_path)
    try:
        assert set(gpus.values()) == {"0", "1"}
        second.kill()
        second.wait()
        assert told(third) == gpus[second]
    finally:
        for process in (first, second, third):
            process.kill()
            process.communicate()


def test_a_waiting_stage_can_be_cancelled(tmp_path: Path) -> None:
    cancelled = threading.Event()
    with lease(["0"], cancelled, tmp_path) as held:
        assert held is not None
        threading.Timer(0.3, cancelled.set).start()
        with lease(["0"], cancelled, tmp_path) as other:
            assert other is None
    with lease(["0"], threading.Event(), tmp_path) as again:
        assert again is not None


def test_several_gpus_are_taken_together_or_not_at_all(tmp_path: Path) -> None:
    cancelled = threading.Event()
    with lease(["0", "1", "2"], cancelled, tmp_path) as one:
        assert one is not None
        with lease(["0", "1", "2"], cancelled, tmp_path, count=2) as two:
            assert two is not None
            assert sorted(one.gpus + two.gpus) == ["0", "1", "2"]
        threading.Timer(0.3, cancelled.set).start()
        with lease(["0", "1", "2"], cancelled, tmp_path, count=3) as three:
            assert three is None
        with lease(["1", "2"], threading.Event(), tmp_path, count=2) as rest:  # the one that waited holds none of them
            assert rest is not None
    with lease(["0"], threading.Event(), tmp_path, count=4) as all_there_are:
        assert all_there_are is not None
        assert all_there_are.gpus == ["0"]


def test_no_gpu_means_no_waiting(tmp_path: Path) -> None:
    with lease([], threading.Event(), tmp_path) as held:
        assert held is None


@pytest.mark.parametrize(
    ("value", "gpus"),
    [
        ("", []),
        ("-1", []),
        ("0,2", ["0", "2"]),
        ("GPU-5a, MIG-1/2", ["GPU-5a", "MIG-1/2"]),
        ("1,-1,2", ["1"]),
    ],
)
def test_visible_gpus_follow_cuda(monkeypatch: pytest.MonkeyPatch, value: str, gpus: list[str]) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert visible_gpus() == gpus


def test_installed_gpus_are_counted_without_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: GPU-a)'\necho 'GPU 1: NVIDIA H100 (UUID: GPU-b)'\n")
    fake.chmod(0o755)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert visible_gpus() == ["0", "1"]
    fake.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert visible_gpus() == []
