"""The stage graph as DVC sees it. The only module that touches `dvc.repo`, which is internal API."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from flows.errors import Problem, nearest

LOCK = Path("dvc.lock")


@dataclass(frozen=True)
class Graph:
    """Stages in an order in which they can run, what each needs directly, and what is not up to date."""

    needs: dict[str, tuple[str, ...]]
    changed: frozenset[str]  # DVC has to be asked about these
    meddled: frozenset[str]  # of them, those whose outputs are missing or not what dvc.lock says


def read(root: Path, target: str | None = None) -> Graph:
    """The graph, or the part of it that `target` needs, with the state of every stage.

    Raises:
        Problem: no dvc.yaml, a faulty one, or an unknown target.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from dvc.scm import SCMError

    try:
        with Repo(str(root), _wait_for_lock=True) as repo:
            edges = repo.index.graph
            needs = {
                stage.addressing: tuple(sorted(other.addressing for other in edges.successors(stage)))
                for stage in edges.nodes
            }
            names = ordered(needs, target)
            status = repo.status(targets=names) if target else repo.status()
    except (DvcException, SCMError) as error:
        raise Problem(f"dvc: {error}") from None
    return Graph(
        {name: needs[name] for name in names},
        frozenset(name for name in names if name in status),
        frozenset(name for name in names if any("changed outs" in entry for entry in status.get(name, ()))),
    )


def ordered(needs: dict[str, tuple[str, ...]], target: str | None = None) -> list[str]:
    """Stage names, upstream ones first and otherwise by name; only what `target` needs when there is one.

    `speed` stands for speed@dense, speed@pruned and so on.

    Raises:
        Problem: an unknown target.
    """
    wanted = [name for name in sorted(needs) if target in (None, name, name.partition("@")[0])]
    if target is not None and not wanted:
        raise Problem(f"no stage is called `{target}`; {nearest(target, needs)}")
    names: dict[str, None] = {}

    def visit(name: str) -> None:
        if name not in names:
            for other in needs[name]:
                visit(other)
            names[name] = None

    for name in wanted:
        visit(name)
    return list(names)


def outputs(lock: str | Path) -> dict[str, dict[str, tuple[str, int]]]:
    """Outputs of each stage by path, with hash and size in bytes, as dvc.lock (or its text) has them.

    Nothing when it is missing or just being written.
    """
    try:
        text = lock.read_text(encoding="utf-8") if isinstance(lock, Path) else lock
        stages = (yaml.load(text, Loader=_loader()) or {}).get("stages", {})  # noqa: S506
        return {name: _outs(entry) for name, entry in stages.items()}
    except (OSError, yaml.YAMLError, AttributeError, KeyError, TypeError):
        return {}


def _outs(entry: dict[str, Any]) -> dict[str, tuple[str, int]]:
    return {out["path"]: (str(out.get("md5")), int(out.get("size", 0))) for out in entry.get("outs", [])}


def _loader() -> Any:
    return getattr(yaml, "CSafeLoader", yaml.SafeLoader)
