"""One Prefect server for all tests, one pipeline that has run once, and a fresh copy of it per test."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows import group, server
from tests.flows.workspace import Workspace


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def outside(home: Path) -> dict[str, str]:
    """Environment that keeps everything a flow writes out of the user's home."""
    return {"HOME": str(home), "DVC_SITE_CACHE_DIR": str(home / "dvc"), "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.fixture(scope="session")
def api(home: Path) -> Iterator[str]:
    """Address of a Prefect server."""
    before = os.environ.get("PREFECT_HOME")
    os.environ["PREFECT_HOME"] = str(home / "prefect")
    port = server.free_port()
    process = server.start(port, home, lean=True)
    try:
        server.wait(server.api(port))
        yield server.api(port)
    finally:
        group.end(process)
        if before is None:
            del os.environ["PREFECT_HOME"]
        else:
            os.environ["PREFECT_HOME"] = before


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, outside: dict[str, str], api: str) -> Workspace:
    """A pipeline in which every stage has run. Not to be changed: see `workspace`."""
    made = Workspace(tmp_path_factory.mktemp("finished") / "project", {**outside, "PREFECT_API_URL": api})
    made.create()
    ended = made.flow("--workers", "2")
    assert ended.code == 0, ended
    made.forget()
    return made


@pytest.fixture
def workspace(tmp_path: Path, finished: Workspace) -> Workspace:
    """A copy of the finished pipeline."""
    shutil.copytree(finished.root, tmp_path / "project", symlinks=True)
    return Workspace(tmp_path / "project", finished.own)


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """A shell that starts the tests in the background has them ignore SIGINT, and every flow would inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
