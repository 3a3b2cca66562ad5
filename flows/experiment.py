"""A run with overrides, as an experiment of DVC: `dvc exp run --temp -S key=value`."""

import json
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flows import graph, overrides, stage, table
from flows.errors import Problem
from flows.table import Result

NAME = re.compile(r"^Ran experiment\(s\): (?P<name>\S+)")
FAILED = re.compile(r"failed to reproduce '(?P<name>[^']+)'")


@dataclass
class Found:
    """What an experiment came to: results by stage, its name (None: it failed), dvc.lock and metrics."""

    results: dict[str, Result]
    name: str | None = None
    lock: str = ""
    metrics: list[dict[str, Any]] = field(default_factory=list)


def run(
    root: Path,
    names: list[str],
    values: dict[str, Any],
    target: str | None,
    execute: Callable[[list[str], Callable[[str], None]], stage.Outcome],
) -> Found:
    """Runs the experiment by `execute`, reading stage states off DVC's output. Stages run one by one.

    Raises:
        Problem: no git commit to start from.
    """
    _need_commit(root)
    if new := (_git(root, "ls-files", "--others", "--exclude-standard") or "").split("\n")[:-1]:
        print(f"note: the experiment does not see {len(new)} files unknown to git, as {new[0]}; git add them")
    results: dict[str, Result] = {}
    now: list[tuple[str, float]] = []
    found = Found(results)

    def end_stage() -> None:
        if now:
            name, began = now.pop()
            results[name].seconds = time.monotonic() - began

    def heard(line: str) -> None:
        if match := NAME.match(line):
            found.name = match["name"]
        elif said := stage.said(line):
            end_stage()
            name, state = said
            results[name] = Result(state)
            now.append((name, time.monotonic()))
        elif match := FAILED.search(line):
            end_stage()
            results[match["name"]] = Result("Failed")

    command = stage.dvc("exp", "run", "--temp", *overrides.arguments(values), *([target] if target else []))
    outcome = execute(command, heard)
    end_stage()
    if outcome.code != 0:
        failed = [result for result in results.values() if result.state == "Failed"]
        for result in failed:
            result.errors = outcome.errors
        if not failed:
            results["experiment"] = Result("Failed", errors=outcome.errors)
        return found
    for name in names:
        results.setdefault(name, Result("Cached"))
    if found.name:
        found.lock = _git(root, "show", f"{_commit(root, found.name)}:{graph.LOCK}") or ""
        found.metrics = _metrics(root, found.name)
    return found


def told(found: Found) -> None:
    """Prints the experiment's name and how to take it over."""
    if found.name:
        print(f"experiment {found.name}: params.yaml is as it was. To take it over: dvc exp apply {found.name}")


def _need_commit(root: Path) -> None:
    if _git(root, "rev-parse", "--verify", "HEAD") is None:
        raise Problem("--set runs an experiment of DVC, which starts from a git commit, and there is none yet")


def _commit(root: Path, name: str) -> str:
    references = (_git(root, "for-each-ref", "--format=%(refname)", "refs/exps") or "").split()
    return next((reference for reference in references if reference.rpartition("/")[2] == name), name)


def _metrics(root: Path, name: str) -> list[dict[str, Any]]:
    text = _git(root, "show", f"{_commit(root, name)}:{table.METRICS}")
    try:
        return table.rows(json.loads(text)) if text else []
    except ValueError:
        return []


def _git(root: Path, *words: str) -> str | None:
    answer = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=False)  # noqa: S607
    return answer.stdout if answer.returncode == 0 else None
