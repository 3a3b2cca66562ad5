"""Runs a command, and ends its whole process group once the process that started this one is gone.

Used as `python -I -S guard.py COMMAND...` in a session of its own, with a pipe as standard input whose other
end the parent keeps open. A parent that is killed outright cannot clean up; the pipe then reads as ended, and
no stage is left computing for nobody. Standard library only: it starts in some 20 ms.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

GRACE = 10.0  # seconds between asking a group to end and killing it


def main() -> int:
    # A handler, not SIG_IGN, which the command would inherit: it has to end, the guard has to see to it.
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGINT, lambda *_: None)
    orphaned = threading.Event()
    command = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    threading.Thread(target=_watch, args=(orphaned,), daemon=True).start()
    code = command.wait()
    if orphaned.is_set():
        time.sleep(2 * GRACE)  # what the command started may still live; the watcher kills the group, us included
    _sweep()
    return code if code >= 0 else 128 - code


def _watch(orphaned: threading.Event) -> None:
    while os.read(0, 1):
        pass
    orphaned.set()
    os.killpg(0, signal.SIGTERM)
    deadline = time.monotonic() + GRACE
    while time.monotonic() < deadline and living(os.getpgrp()) != {os.getpid()}:
        time.sleep(0.1)
    os.killpg(0, signal.SIGKILL)


def _sweep(grace: float = 2.0) -> None:
    """Ends what the finished command left in the background."""
    deadline = time.monotonic() + grace
    number = signal.SIGTERM
    while left := (living(os.getpgrp()) or set()) - {os.getpid()}:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        if time.monotonic() > deadline:
            number = signal.SIGKILL
        time.sleep(0.05)


def living(group: int) -> set[int] | None:
    """Ids of the processes in a group that have not ended; None where there is no /proc."""
    try:
        numbers = [int(name) for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208
    except OSError:
        return None
    found = set()
    for number in numbers:
        try:
            with open(f"/proc/{number}/stat", "rb") as file:  # noqa: PTH123
                fields = file.read().rpartition(b")")[2].split()
        except OSError:
            continue  # it ended meanwhile
        if int(fields[2]) == group and fields[0] != b"Z":
            found.add(number)
    return found


if __name__ == "__main__":
    sys.exit(main())
