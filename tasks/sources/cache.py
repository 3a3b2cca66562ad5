"""What was fetched: whole or not there, under a seal with its hash, one fetch at a time."""

import errno
import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from filelock import FileLock

from compression.core.errors import Problem

CACHE = Path(".work/sources")
_CHUNK = 1 << 20  # bytes


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes; of a folder, over the names and digests of all files in it."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    inside = sorted(p for p in path.rglob("*") if p.is_file())
    lines = [f"{digest(p)}  {p.relative_to(path).as_posix()}\n" for p in inside]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def copy(source: IO[bytes], path: Path) -> str:
    """Writes a stream to `path`; the SHA-256 of what was written."""
    hashed = hashlib.sha256()
    with path.open("wb") as copy:
        while chunk := source.read(_CHUNK):
            hashed.update(chunk)
            copy.write(chunk)
    return hashed.hexdigest()


def _seal(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def intact(path: Path, sha256: str | None) -> bool:
    """Whether `path` is in the cache, whole, and what is asked for."""
    if not path.exists() or not _seal(path).is_file():
        return False
    noted = _seal(path).read_text(errors="replace")
    return sha256 in (None, noted) and digest(path) == noted


def settle(arrived: Path, target: Path, sha256: str) -> None:
    """Moves what arrived to its place. The seal comes last: without it the file does not count."""
    target.parent.mkdir(parents=True, exist_ok=True)
    _seal(target).unlink(missing_ok=True)
    if target.is_dir():
        shutil.rmtree(target)
    arrived.replace(target)
    _seal(target).write_text(sha256)


@contextmanager
def temporary() -> Iterator[Path]:
    """A folder in the cache's own file system, so that a move out of it is atomic."""
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="part-") as folder:
        yield Path(folder)


@contextmanager
def alone() -> Iterator[None]:
    """One fetch at a time in this workspace, so that whatever is half done is from a killed run, and goes."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / ".lock"):
        for stale in CACHE.glob("part-*"):
            shutil.rmtree(stale, ignore_errors=True)
        yield


@contextmanager
def room(where: str, path: Path, needed: str) -> Iterator[None]:
    """Says which file found no room, and how much it needs."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_full(where, path, needed) from None
        raise


def disk_full(where: str, path: Path, needed: str) -> Problem:
    free = shutil.disk_usage(CACHE).free
    return Problem(
        where, f"the disk is full: {path} needs {needed}, {free:,} bytes are free", "make room, run it again"
    )


def check(found: str, expected: str, name: str, where: str) -> None:
    if found != expected:
        what = f"{name} is not what was promised: expected sha256 {expected}, got {found}"
        raise Problem(where, what, "if the new file is the right one, put its hash into sha256")
