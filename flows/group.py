"""Starts a command in a process group of its own and ends the whole group."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from flows.guard import living

GUARD = Path(__file__).with_name("guard.py")
GRACE = 10.0  # seconds between asking a group to end and killing it


def start(
    command: Sequence[str],
    cwd: Path,
    env: Mapping[str, str],
    stdout: int | IO[bytes] | None,
    stderr: int | IO[bytes] | None,
    keep: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Starts `command` under the guard, which ends it should we die; `keep`: lock files to hold meanwhile."""
    return subprocess.Popen(
        [sys.executable, "-I", "-S", str(GUARD), *command],
        cwd=cwd,
        env=env,
        stdin=subprocess.PIPE,  # never written to: its closing is what tells the guard that we are gone
        stdout=stdout,
        stderr=stderr,
        pass_fds=keep,
        start_new_session=True,
    )


def end(process: subprocess.Popen[bytes], grace: float = GRACE) -> None:
    """Ends the process and everything in its group: asks first, kills after `grace` seconds."""
    _signal(process.pid, signal.SIGTERM)
    deadline = time.monotonic() + grace
    while time.monotonic() < deadline:
        process.poll()  # collects the guard, which would count as a member of the group until then
        members = living(process.pid)
        if members == set() or (members is None and not _signal(process.pid, 0)):
            break
        time.sleep(0.05)
    else:
        _signal(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin:
        process.stdin.close()


def _signal(group: int, number: int) -> bool:
    """False when nobody is left in the group."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):  # macOS: not permitted, when only ended ones are left
        return False
    return True
