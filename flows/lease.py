"""GPU leases: a GPU for one stage at a time, over all flows of this user on this machine.

A lease is a locked file per GPU. The lock belongs to the process and the stage it starts: a crash frees it.
"""

import os
import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flows.locks import try_lock

POLL = 0.5  # seconds between two looks for a free GPU


@dataclass(frozen=True)
class Lease:
    """GPUs for one stage: the names that CUDA_VISIBLE_DEVICES takes, and the lock files to hand to the stage."""

    gpus: list[str]
    files: list[int]


def visible_gpus() -> list[str]:
    """GPUs that stages may use, as CUDA_VISIBLE_DEVICES names them; asks nvidia-smi when that is not set."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return _installed()
    names = []
    for name in chosen.replace(" ", "").split(","):
        if name in ("", "-1", "NoDevFiles"):
            break  # CUDA, too, sees nothing from the first invalid entry on
        names.append(name)
    return names


def lease_folder() -> Path:
    """Folder of the lock files, the same for every workspace of this user."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "pareline" / "leases"


@contextmanager
def lease(
    gpus: list[str], cancelled: threading.Event, folder: Path | None = None, count: int = 1
) -> Iterator[Lease | None]:
    """Waits for `count` free ones of `gpus` at once (all, if there are fewer) and holds them.

    Yields None without GPUs, or when cancelled first.
    """
    folder = folder or lease_folder()
    taken = None
    while gpus and not cancelled.is_set():
        taken = _try(gpus, min(count, len(gpus)), folder)
        if taken or cancelled.wait(POLL):
            break
    try:
        yield taken
    finally:
        for file in taken.files if taken else []:
            os.close(file)


def _try(gpus: list[str], count: int, folder: Path) -> Lease | None:
    """So many free GPUs, or none of them: who holds some while it waits for others may wait for ever."""
    held: dict[str, int] = {}
    for gpu in gpus:
        file = try_lock(folder / f"gpu-{re.sub('[^A-Za-z0-9-]', '_', gpu)}.lock")
        if file is not None:
            held[gpu] = file
        if len(held) == count:
            return Lease(list(held), list(held.values()))
    for file in held.values():
        os.close(file)
    return None


def _installed() -> list[str]:
    """Indexes of the GPUs that nvidia-smi lists, in its order; none when there is no nvidia-smi."""
    try:
        listing = subprocess.run(
            ["nvidia-smi", "-L"],  # noqa: S607
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return re.findall(r"^GPU (\d+):", listing, flags=re.MULTILINE)
