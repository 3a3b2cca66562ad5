"""Starts a Prefect server on this machine, reachable from this machine only."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flows import environment, group
from flows.errors import Problem

HOST = "127.0.0.1"
STARTUP = 120.0  # seconds


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def port_taken(port: int) -> bool:
    """Does somebody listen there?"""
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


def api(port: int) -> str:
    """Address of the server's API."""
    return f"http://{HOST}:{port}/api"


@contextmanager
def temporary(root: Path) -> "Iterator[tuple[str, subprocess.Popen[bytes]]]":
    """A server for one flow run; yields its address and process while it is still starting: see `wait`.

    Prefect would start one by itself, but only when the flow begins, and in our process group, where Ctrl-C
    would take it away before the flow could tell it how the stages ended.
    """
    port = free_port()
    process = start(port, root, lean=True)
    try:
        yield api(port), process
    finally:
        group.end(process, grace=5.0)


def start(port: int, root: Path, lean: bool = False) -> "subprocess.Popen[bytes]":
    """Starts a server; a lean one has no pages and no scheduler. What it says goes to its log file."""
    env = {**os.environ, "PREFECT_API_URL": api(port), "PREFECT_UI_API_URL": api(port)}
    if lean:  # what Prefect does itself when a flow starts without a server
        env |= {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}
        command = [sys.executable, "-m", "uvicorn", "--factory", "prefect.server.api.server:create_app"]
        command += ["--host", HOST, "--port", str(port), "--log-level", "error", "--lifespan", "on"]
    else:
        command = [sys.executable, "-m", "prefect", "server", "start", "--host", HOST, "--port", str(port)]
    path = log_file(lean)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        return group.start(command, root, env, file, file)


def log_file(lean: bool = False) -> Path:
    """Where a server of this workspace writes what it says."""
    return Path(os.environ["PREFECT_HOME"]) / ("flow-server.log" if lean else "server.log")


def wait(
    address: str,
    process: "subprocess.Popen[bytes] | None" = None,
    stopped: threading.Event | None = None,
    seconds: float = STARTUP,
) -> None:
    """Waits until the server answers, or `stopped` is set.

    Raises:
        Problem: it ended (where its process is given), or did not answer within `seconds`.
    """
    stopped = stopped or threading.Event()
    deadline = time.monotonic() + seconds
    while not environment.healthy(address):
        if (process and process.poll() is not None) or time.monotonic() > deadline:
            raise Problem(f"no Prefect server answers at {address}; its logs are in {os.environ['PREFECT_HOME']}")
        if stopped.wait(0.1):
            return
