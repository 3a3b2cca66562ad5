"""Stage `report`: what the compression cost and what it bought, as a page, metrics and a model card.

Reads the evaluations, the speeds, the sensitivity table and the checkpoints' manifests, never a tensor.
"""

import json
import shutil
from pathlib import Path

from tasks.core.entry import run_stage
from tasks.reporting.figures import metrics, tables
from tasks.reporting.inputs import read_run, read_sensitivity
from tasks.reporting.page import describe, render


def main() -> None:
    build_report(Path(), Path("data/report"))


def build_report(root: Path, out: Path) -> None:
    """Writes metrics.json, plots/*.csv, index.html and README.md into `out`, replacing it.

    Args:
        root: the repository's root; inputs are read from its data/ folder.

    Raises:
        Problem: an input is missing or malformed; `out` stays as it was.
    """
    run = read_run(root)
    drawn = tables(run, read_sensitivity(root))
    page = describe(run, drawn)
    files = {
        "metrics.json": json.dumps(metrics(run), indent=2, allow_nan=False) + "\n",
        "index.html": render("report.html.j2", page),
        "README.md": render("card.md.j2", page),
    } | {f"plots/{name}.csv": table.to_csv(index=False, float_format="%.8g") for name, table in drawn.items()}

    shutil.rmtree(out, ignore_errors=True)
    for name, text in files.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    run_stage(main)
