"""Prefect's server, a worker and the nightly schedule, until Ctrl-C: python -m flows.serve [--port N]."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated

import typer

from flows import environment, group, server
from flows.errors import Problem

POOL = "pareline"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the server on 127.0.0.1.")] = 4200,
) -> None:
    """Serve the schedule of prefect.yaml and Prefect's pages until Ctrl-C."""
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    try:
        code = serve(Path.cwd(), port, stopped)
    except Problem as problem:
        print(f"error: {problem}", file=sys.stderr)
        code = 1
    raise typer.Exit(code)


def serve(root: Path, port: int, stopped: threading.Event) -> int:
    """Runs server and worker until `stopped` is set; 1 when one of them ended by itself.

    Raises:
        Problem: no prefect.yaml here, the port is taken, or the server or the deployment failed.
    """
    if not (root / "prefect.yaml").is_file():
        raise Problem("there is no prefect.yaml here; run from the project's root")
    if server.port_taken(port):
        raise Problem(f"something listens on port {port} already; choose another with --port")
    address = server.api(port)
    environment.prepare(root)
    os.environ |= {
        "PREFECT_API_URL": address,
        "PREFECT_UI_API_URL": address,
        "PARELINE_ROOT": str(root),  # what prefect.yaml's pull step asks for
    }
    with ExitStack() as stack:
        serving = stack.enter_context(_ended_after(server.start(port, root)))
        server.wait(address, serving, stopped)
        for words in (
            ["work-pool", "create", POOL, "--type", "process", "--overwrite"],
            ["deploy", "--all"],
        ):
            if stopped.is_set():
                return 0
            _prefect(root, *words)
        worker = _worker(root)
        stack.enter_context(_ended_after(worker))
        stack.enter_context(_announced(address))
        print(
            f"serving http://{server.HOST}:{port} and the deployment compress/nightly; Ctrl-C ends both",
            flush=True,
        )
        while not stopped.wait(0.5):
            for name, process in (("server", serving), ("worker", worker)):
                if process.poll() is not None:
                    raise Problem(f"the Prefect {name} ended by itself; see {_log(name)}")
        print("stopping", flush=True)
    return 0


def _worker(root: Path) -> "subprocess.Popen[bytes]":
    words = ["worker", "start", "--pool", POOL, "--type", "process", "--name", "pareline-worker"]
    with _log("worker").open("wb") as file:
        return group.start([sys.executable, "-m", "prefect", *words], root, os.environ, file, file)


def _prefect(root: Path, *words: str) -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", *words],
        cwd=root,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    if answer.returncode != 0:
        raise Problem(f"prefect {' '.join(words)} failed:\n{(answer.stdout + answer.stderr).strip()}")


def _log(name: str) -> Path:
    return Path(os.environ["PREFECT_HOME"]) / f"{name}.log"


@contextmanager
def _ended_after(process: "subprocess.Popen[bytes]") -> "Iterator[subprocess.Popen[bytes]]":
    try:
        yield process
    finally:
        group.end(process, grace=30.0)  # a worker ends its flow run first, and that its stages


@contextmanager
def _announced(address: str) -> Iterator[None]:
    """Leaves our address for flows started by hand while we live."""
    note = environment.server_file()
    note.write_text(json.dumps({"pid": os.getpid(), "api": address}), encoding="utf-8")
    try:
        yield
    finally:
        note.unlink(missing_ok=True)


if __name__ == "__main__":
    app()
