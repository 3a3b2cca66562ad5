"""A model's folder, or one file, on the hub."""

import glob
import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from fnmatch import fnmatch
from pathlib import Path

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
from tasks.sources.address import Hub, refuse_only_pickles
from tasks.sources.cache import CACHE, check, digest, room, settle

MODEL_FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken")


def from_hub(origin: Hub, sha256: str | None, target: Path, where: str) -> None:
    """Downloads a model's folder, or one file, to `target`; a download that was cut off is gone on with."""
    source = f"{origin.repo}@{origin.revision}"
    half = CACHE / f"resume-{hashlib.sha256(f'{origin}'.encode()).hexdigest()[:16]}"
    with _hub_problems(source, where):
        ask = HfApi().dataset_info if origin.kind == "dataset" else HfApi().model_info
        info = ask(origin.repo, revision=origin.revision, files_metadata=True)
    files = _choose({file.rfilename: file for file in info.siblings or []}, origin, where)
    needed = sum(file.size or 0 for file in files)
    with _hub_problems(source, where), room(where, target, f"{needed:,} bytes"):
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
            check(digest(arrived), sha256 or digest(arrived), f"{origin.path} of {source}", where)
        except Problem:
            shutil.rmtree(half)
            raise
    shutil.rmtree(half / ".cache", ignore_errors=True)  # the library's notes, only good for resuming
    settle(arrived, target, digest(arrived))
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
    refuse_only_pickles(top, origin.repo, where)
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
