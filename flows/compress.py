"""Brings all stages up to date: python -m flows.compress [--params FILE] [--set key=value] [--target STAGE]
[--workers N]."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from flows import environment, locks, overrides, server
from flows.errors import Problem

STOPPED = 130  # exit code after Ctrl-C or SIGTERM

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Run an experiment with this key of params.yaml changed."),
    ] = None,
    params: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Run an experiment with the keys in this file put over params.yaml."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Most stages side by side. Default: cores // compute.threads.")
    ] = None,
    target: Annotated[str | None, typer.Option(help="Run only this stage and what it needs.")] = None,
) -> None:
    """Bring the pipeline up to date: stages that nothing changed for are not run."""
    try:
        with _stoppable():
            code = _run(Path.cwd(), params, changes or [], workers, target)
    except Problem as problem:
        print(f"error: {problem}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        code = STOPPED
    sys.stdout.flush()
    raise typer.Exit(code)


def _run(root: Path, params: Path | None, changes: list[str], workers: int | None, target: str | None) -> int:
    """Exit code of a flow run: 0 when every stage is up to date, 1 when one failed, 130 when stopped."""
    if not (root / "dvc.yaml").is_file():
        raise Problem("there is no dvc.yaml here; run from the project's root")
    overrides.read(root / "params.yaml", params, changes)  # a typo is told before anything is started
    environment.prepare(root)
    environment.quiet_console()
    with locks.workspace(root):
        known = environment.running_server()
        with nullcontext((known, None)) if known else server.temporary(root) as (address, process):
            os.environ["PREFECT_API_URL"] = address
            from flows import pipeline  # reads the environment, and takes seconds, in which the server starts

            server.wait(address, process)
            try:
                file = str(params) if params else None
                state = pipeline.compress(
                    target=target, workers=workers, params=file, changes=changes, return_state=True
                )
            finally:
                pipeline.deliver()
    if state.is_completed():
        return 0
    return STOPPED if state.is_cancelled() else 1


@contextmanager
def _stoppable() -> Iterator[None]:
    """Lets SIGTERM end the program as Ctrl-C does, cleaning up."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    app()
