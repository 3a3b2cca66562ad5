"""Runs DVC as a subprocess, streams what it and its stages print, and tells what became of them."""

import fcntl
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flows import group
from flows.console import COLOURS, Console

KEPT = 15  # last lines of standard error that are shown for a failed stage
BREAK = re.compile(rb"\r\n|\r|\n")
SAID = (
    (re.compile(r"^Running stage '(?P<name>.+)':$"), "Completed"),
    (re.compile(r"^Stage '(?P<name>.+)' is cached - skipping run"), "Cached"),
    (re.compile(r"^Stage '(?P<name>.+)' didn't change, skipping"), "Cached"),
)
# DVC's advice to somebody who typed the command by hand; in a flow it would be repeated after every stage.
ADVICE = re.compile(
    r"^(To track the changes with git, run:|To enable auto staging, run:|\s+git add "
    r"|\s+dvc config core.autostage|Use `dvc push` to send|Generating lock file|Updating lock file"
    r"|Data and pipelines are up to date"
    r"|To apply the results of an experiment|\s+dvc exp apply <exp>|To promote an experiment"
    r"|\s+dvc exp branch <exp>)"
)
DVC_ERROR = re.compile(r"^ERROR: failed to (reproduce|run)")


@dataclass
class Outcome:
    """What became of a DVC command: its exit code and the last lines on standard error."""

    code: int
    errors: list[str] = field(default_factory=list)


def said(line: str) -> tuple[str, str] | None:
    """Stage name and state that a line of DVC's standard output announces; None for any other line."""
    for pattern, state in SAID:
        if match := pattern.match(line):
            return match["name"], state
    return None


def dvc(*words: str) -> list[str]:
    """A DVC command line. It waits for the lock: stages that end together would clash."""
    return [sys.executable, "-m", "dvc", "--wait-for-lock", *words]


def repro(name: str) -> list[str]:
    """The command that brings one stage up to date, and nothing upstream of it."""
    return dvc("repro", "--single-item", name)


def run(
    name: str,
    command: Sequence[str],
    root: Path,
    console: Console,
    cancelled: threading.Event,
    heard: Callable[[str], None],
    variables: Mapping[str, str] | None = None,
    keep: Sequence[int] = (),
) -> Outcome:
    """Runs `command` to its end, or ends its whole process group once `cancelled` is set.

    Args:
        name: who speaks, for the console.
        heard: called with every finished line on either stream, from two threads.
        variables: environment variables beside our own.
        keep: lock files that stay held while the command lives.
    """
    errors: deque[str] = deque(maxlen=KEPT)
    lock = threading.Lock()

    def out(line: str) -> None:
        with lock:
            heard(line)

    def err(line: str) -> None:
        with lock:
            errors.append(line)
            heard(line)

    env = {**os.environ, "PYTHONUNBUFFERED": "1", "DVC_NO_ANALYTICS": "1", **(variables or {})}
    parent_end, child_end = _terminal() if console.interactive else os.pipe()
    if console.interactive:
        env["COLUMNS"] = str(shutil.get_terminal_size().columns)
    console.enter(name)
    try:
        try:
            process = group.start(command, root, env, subprocess.PIPE, child_end, keep)
        finally:
            os.close(child_end)
        assert process.stdout is not None
        readers = [
            threading.Thread(target=_read, args=(process.stdout.fileno(), name, console, out), daemon=True),
            threading.Thread(target=_read, args=(parent_end, name, console, err), daemon=True),
        ]
        for reader in readers:
            reader.start()
        _wait(process, cancelled)
        for reader in readers:
            reader.join(timeout=5.0)  # a stray grandchild could hold the pipe open
        process.stdout.close()
    finally:
        os.close(parent_end)
        console.leave(name)
    return Outcome(process.returncode, _telling(list(errors)))


def _wait(process: "subprocess.Popen[bytes]", cancelled: threading.Event) -> None:
    while True:
        try:
            process.wait(timeout=0.2)
            return
        except subprocess.TimeoutExpired:
            if cancelled.is_set():
                group.end(process)
                return


def _read(file: int, name: str, console: Console, line: Callable[[str], None]) -> None:
    """Cuts a stream into lines. What ends in a carriage return, or has no end yet, is a progress bar."""
    rest = b""
    while True:
        try:
            chunk = os.read(file, 65536)
        except OSError:  # a terminal whose other side was closed
            chunk = b""
        if not chunk:
            break
        rest += chunk
        held_back = rest.endswith(b"\r")  # may be the first half of \r\n
        position = 0
        for match in BREAK.finditer(rest, 0, len(rest) - held_back):
            text = rest[position : match.start()].decode(errors="replace")
            position = match.end()
            if match.group() == b"\r":
                _bar(text, name, console)
            else:
                _line(text, name, console, line)
        rest = rest[position:]
        if rest.strip():
            _bar(rest.decode(errors="replace").rstrip("\r"), name, console)
    if rest.strip():
        _line(rest.decode(errors="replace"), name, console, line)


def _line(text: str, name: str, console: Console, line: Callable[[str], None]) -> None:
    plain = COLOURS.sub("", text).rstrip()
    if not plain or ADVICE.match(plain):
        return
    line(plain)
    console.line(name, text.rstrip() if console.interactive else plain)


def _bar(text: str, name: str, console: Console) -> None:
    if COLOURS.sub("", text).strip() not in ("", "!"):  # DVC's bars begin as a bare exclamation mark
        console.bar(name, text)


def _telling(errors: list[str]) -> list[str]:
    """The stage's own last lines; DVC's only where the stage said nothing."""
    own = [line for line in errors if not DVC_ERROR.match(line)]
    return own or errors


def _terminal() -> tuple[int, int]:
    """Both ends of a pseudo terminal of our own terminal's size, so that stages draw their progress bars."""
    parent_end, child_end = pty.openpty()
    size = shutil.get_terminal_size()
    fcntl.ioctl(child_end, termios.TIOCSWINSZ, struct.pack("HHHH", size.lines, size.columns, 0, 0))
    return parent_end, child_end
