"""Stage sensitivity writes one table, whatever the measure."""

import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml

from compression.core.checkpoint import Checkpoint
from compression.core.errors import Problem
from compression.core.files import write_tensors
from tasks import sensitivity
from tests import tiny
from tests.conftest import Make
from tests.imports import ROOT

TABLE = Path("data/sensitivity/sensitivity.csv")
COSTS = ["cost_2", "cost_4"]


@pytest.fixture
def project(tmp_path: Path, imported: Make, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    """A project with a tiny llama, input norms and a calibration text."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(imported("llama"), "data/taught")
    model = Checkpoint(Path("data/taught"))
    for folder in ("calibration", "corpora"):
        Path("data", folder).mkdir()
    norms = {layer: torch.ones(width) for layer, (_, width) in model.layers.items()}
    write_tensors(Path("data/calibration/input_norms.safetensors"), norms)
    tokens = tiny.encode(tiny.sentences(2, 12)).flatten()
    write_tensors(Path("data/corpora/calibration.safetensors"), {"tokens": tokens.to(torch.int32)})
    return model


def run(**changes: Any) -> pd.DataFrame:
    document = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    document["compute"] = {"device": "cpu", "dtype": "float32", "threads": 1}
    document["sensitivity"] |= {"widths": [2, 4], "group_size": 32, "components": 2, "sequences": 6, "length": 32}
    document["sensitivity"] |= changes
    Path("params.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    sensitivity.main()
    return pd.read_csv(TABLE)


@pytest.mark.parametrize("per", ["block", "group", "layer"])
@pytest.mark.parametrize(
    ("method", "columns"),
    [
        ("none", []),
        ("pmpq", ["pmpq"]),
        ("cmpq", ["cmpq"]),
        ("tdmpq", ["tdmpq", *COSTS]),
        ("noise", ["noise"]),
        ("measured", ["measured", *COSTS]),
    ],
)
def test_the_table_has_the_columns_of_the_measure(
    project: Checkpoint, method: str, columns: list[str], per: str
) -> None:
    table = run(method=method, per=per)
    assert list(table.columns) == ["layer", "block", "parameters", *columns, "outlier_ratio"]
    assert table["layer"].tolist() == list(project.layers)
    assert table["block"].tolist() == [int(layer.split(".")[2]) for layer in project.layers]
    assert table.notna().all(axis=None)
    if columns:
        assert table.groupby("block")[method].nunique().max() == {"block": 1, "group": 4, "layer": 7}[per]
    before = TABLE.read_bytes()
    run(method=method, per=per)
    assert TABLE.read_bytes() == before


@pytest.mark.parametrize(("method", "curvature"), [("tdmpq", "outputs"), ("measured", "diagonal")])
def test_costs_are_those_of_the_rounding_that_was_asked_for(project: Checkpoint, method: str, curvature: str) -> None:
    nearest = run(method=method, per="group", curvature=curvature)
    careful = run(method=method, per="group", curvature=curvature, rounding="gptq", around=4)
    assert careful.notna().all(axis=None)
    assert (careful["cost_4"] == 0).all()  # from where all layers have 4 bits, that costs nothing
    assert 0 < careful["cost_2"].sum() < nearest["cost_2"].sum()
    before = TABLE.read_bytes()
    run(method=method, per="group", curvature=curvature, rounding="gptq", around=4)
    assert TABLE.read_bytes() == before


def test_layers_are_tried_around_a_width_that_is_tried(project: Checkpoint) -> None:
    with pytest.raises(Problem, match=r"around: 3 is not among the widths \[2, 4\]"):
        run(method="measured", around=3)
