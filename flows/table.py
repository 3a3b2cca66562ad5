"""What a flow tells at its end: a row per stage, the failed ones' own words, and the metrics."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

METRICS = Path("data/report/metrics.json")
COLOURS = {"Cached": "blue", "Completed": "green", "Failed": "red", "NotRun": "yellow", "Cancelled": "yellow"}


@dataclass
class Result:
    """How one stage ended: Cached, Completed, Failed, Cancelled or NotRun."""

    state: str
    seconds: float = 0.0
    errors: list[str] = field(default_factory=list)


def size(count: int | None) -> str:
    """Bytes for people, in powers of 1024."""
    if count is None:
        return "-"
    value, units = float(count), iter(("B", "KiB", "MiB", "GiB"))
    for unit in units:
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def show(results: Mapping[str, Result], sizes: Mapping[str, int], names: list[str]) -> None:
    """Prints the table, and under it what each failed stage said last."""
    console = Console()
    table = Table("stage", "state", "seconds", "bytes")
    table.columns[2].justify = table.columns[3].justify = "right"
    for name in names:
        result = results.get(name, Result("NotRun"))
        colour = COLOURS.get(result.state, "white")
        seconds = f"{result.seconds:.1f}" if result.seconds >= 0.05 else "-"
        bytes_ = size(sizes.get(name)) if result.state in ("Cached", "Completed") else "-"
        table.add_row(escape(name), f"[{colour}]{result.state}[/]", seconds, bytes_)
    console.print(table)
    for name in names:
        if name in results and results[name].state == "Failed":
            console.print(f"[red]{escape(name)} failed:[/]")
            for line in results[name].errors or ["(it said nothing; look at its output above)"]:
                console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)


def metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.json; none when there is no such file."""
    try:
        return rows(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return []


def rows(document: Any) -> list[dict[str, Any]]:
    """A row per metric and a column per checkpoint; none when the document is not like that."""
    if not isinstance(document, dict):
        return []
    columns = {checkpoint: _flat(values) for checkpoint, values in document.items()}
    names = dict.fromkeys(name for values in columns.values() for name in values)
    return [{"metric": name} | {column: columns[column].get(name) for column in columns} for name in names]


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix.rstrip("."): values}
    return {key: value for name, item in values.items() for key, value in _flat(item, f"{prefix}{name}.").items()}
