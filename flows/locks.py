"""File locks that the kernel frees when the process that holds them ends, however it ends."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flows.errors import Problem

FLOW_LOCK = Path(".work/flow.lock")
STOPPING = 20.0  # seconds that stages of a killed flow may take to end

_held: dict[Path, int] = {}  # workspaces that this process holds, with the open lock file


def try_lock(path: Path) -> int | None:
    """An open file that holds the lock, our process id written in it; None when somebody else has it.

    Close the file to free the lock. A child that is handed the file keeps the lock as long as it lives.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        return None
    os.ftruncate(file, 0)
    os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
    return file


def holder(path: Path) -> int | None:
    """Process id that was last written in a lock file; None when there is none."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def alive(pid: int) -> bool:
    """Is there such a process?"""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def workspace(root: Path) -> Iterator[int]:
    """Holds the workspace for one flow; yields the lock file, which stages are handed to keep it held.

    Nested use in the same process is fine: the command line takes it early, the flow takes it again.

    Raises:
        Problem: another flow holds it.
    """
    path = root / FLOW_LOCK
    if path in _held:
        yield _held[path]
        return
    _held[path] = file = _lock_or_say_who(path)
    try:
        yield file
    finally:
        del _held[path]
        os.close(file)


def _lock_or_say_who(path: Path) -> int:
    deadline = time.monotonic() + STOPPING
    while True:
        file = try_lock(path)
        if file is not None:
            return file
        pid = holder(path)
        if pid is None or alive(pid) or time.monotonic() > deadline:
            break
        time.sleep(0.2)  # that flow was killed, and its stages are ending
    raise Problem(f"another flow is running in this workspace (process {pid or 'unknown'}); wait for it or stop it")
