"""Allocation: the sum is exact, bounds hold, rules say what their papers say, and the stages agree on it."""

import shutil
from math import ceil, floor
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from compression.core.checkpoint import Checkpoint
from compression.core.errors import Problem
from compression.core.files import write_tensors
from compression.pruning import allocation
from compression.pruning.pattern import NofM, Unstructured
from tasks import allocate, prune
from tests.compression.helpers import all_masks, all_tensors
from tests.conftest import Make
from tests.imports import ROOT
from tests.reference import allocation as reference

SIZES = {"a": 400, "b": 100, "c": 500}
share = st.floats(0, 0.99).map(lambda value: round(value, 3))


@st.composite
def case(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of `project` that may be impossible to meet."""
    layers = [f"layer{place}" for place in range(draw(st.integers(1, 8)))]
    low, high = sorted([draw(share), draw(share)])
    return {
        "wanted": {layer: draw(st.floats(-1, 2)) for layer in layers},
        "sizes": {layer: draw(st.integers(1, 3000)) for layer in layers},
        "target": draw(share),
        "low": low,
        "high": high,
        "dense": draw(st.sets(st.sampled_from(layers))),
    }


# One weight of which 0.25 to 0.5 should go.
NARROW: dict[str, Any] = {
    "wanted": {"one": 0.0, "other": 0.0, "wide": 0.0},
    "sizes": {"one": 1, "other": 1, "wide": 32},
    "target": 0.375,
    "low": 0.25,
    "high": 0.5,
    "dense": set(),
}


@given(case())
@example(NARROW)
@settings(deadline=None, max_examples=300)
def test_the_sum_is_exact_and_bounds_hold(given: dict[str, Any]) -> None:
    sizes, dense = given["sizes"], given["dense"]
    try:
        dropped = allocation.project(**given)
    except Problem:
        free = [size for layer, size in sizes.items() if layer not in dense]
        budget = round(given["target"] * sum(sizes.values()))
        # A layer can miss a bound by less than a weight.
        assert not given["low"] * sum(free) + len(free) <= budget <= given["high"] * sum(free) - len(free)
        return
    assert list(dropped) == list(sizes)
    assert sum(dropped.values()) == round(given["target"] * sum(sizes.values()))
    for layer, count in dropped.items():
        if layer in dense:
            assert count == 0
        else:
            few, many = given["low"] * sizes[layer], given["high"] * sizes[layer]
            if ceil(few) <= floor(many):
                assert given["low"] <= count / sizes[layer] <= given["high"]
            else:  # no whole number between the bounds
                assert few - 1 < count < many + 1


@given(case())
@settings(deadline=None, max_examples=200)
def test_all_are_shifted_alike(given: dict[str, Any]) -> None:
    try:
        dropped = allocation.project(**given)
    except Problem:
        assume(False)
    naive = reference.shares(**given)
    # Whole bounds and a whole budget move the common shift: each layer by at most a weight for every layer there is.
    for layer, count in dropped.items():
        assert abs(count - naive[layer]) <= len(dropped) + 1


@pytest.mark.parametrize(
    ("wanted", "target", "dense", "dropped"),
    [
        ({"a": 0.5, "b": 0.5, "c": 0.5}, 0.5, (), {"a": 200, "b": 50, "c": 250}),
        ({"a": 0.4, "b": 0.5, "c": 0.6}, 0.5, (), {"a": 156, "b": 49, "c": 295}),  # all less by 0.01
        ({"a": 0.5, "b": 0.5, "c": 0.5}, 0.5, ("c",), {"a": 400, "b": 100, "c": 0}),  # the others carry it all
        ({"a": 0.0, "b": 2.0, "c": 0.0}, 0.5, (), {"a": 178, "b": 100, "c": 222}),  # a bound, and a remainder
    ],
)
def test_by_hand(wanted: dict[str, float], target: float, dense: tuple[str, ...], dropped: dict[str, int]) -> None:
    assert allocation.project(wanted, SIZES, target, 0.0, 1.0, dense) == dropped


def test_equal_remainders_go_to_the_earlier_layer() -> None:
    sizes = {"a": 3, "b": 3, "c": 3, "d": 3}
    assert list(allocation.project(allocation.uniform(sizes, 0.5), sizes, 0.5, 0.0, 0.9, ()).values()) == [2, 2, 1, 1]


@pytest.mark.parametrize(
    ("target", "low", "high", "dense", "range_"),
    [
        (0.5, 0.0, 0.4, (), "0 to 0.4"),
        (0.5, 0.6, 0.9, (), "0.6 to 0.9"),
        (0.5, 0.0, 0.9, ("a", "b"), "0 to 0.45"),
        (0.1, 0.0, 0.9, ("a", "b", "c"), "0 to 0"),
    ],
)
def test_what_cannot_be_reached_is_told_with_the_range(
    target: float, low: float, high: float, dense: tuple[str, ...], range_: str
) -> None:
    with pytest.raises(Problem) as told:
        allocation.project(allocation.uniform(SIZES, target), SIZES, target, low, high, dense)
    assert f"{target:g} cannot be reached" in str(told.value)
    assert told.value.valid == f"what can be reached: {range_}"


def test_owl_by_hand() -> None:
    """Block 0 has D = (1 % of 300 + 5 % of 100) / 400 = 2 %, block 1 has 4 %, block 2 has 3 %."""
    ratios = {"0.q": 0.01, "0.k": 0.05, "1.q": 0.04, "1.k": 0.04, "2.q": 0.03, "2.k": 0.03}
    sizes = dict.fromkeys(ratios, 300) | {"0.k": 100, "1.k": 100, "2.k": 100}
    blocks = {layer: int(layer[0]) for layer in ratios}
    wanted = allocation.owl(ratios, sizes, blocks, 0.7, 0.08)
    expected = {"0": 0.78, "1": 0.62, "2": 0.7}
    assert wanted == pytest.approx({layer: expected[layer[0]] for layer in ratios})
    naive = reference.owl([[0.01, 0.05], [0.04, 0.04], [0.03, 0.03]], [[300, 100]] * 3, 0.7, 0.08)
    assert naive == pytest.approx(list(expected.values()))


def test_blocks_that_are_alike_get_the_target() -> None:
    assert allocation.by_block({0: 0.3, 1: 0.3}, {"a": 0, "b": 1}, 0.6, 0.1) == {"a": 0.6, "b": 0.6}


@given(st.data())
@settings(deadline=None, max_examples=150)
def test_one_global_budget_equals_sorting_everything(data: st.DataObject) -> None:
    number = st.one_of(
        st.integers(0, 3).map(float),  # many ties
        st.floats(0, width=32),
        st.floats(1, 1.0078125, width=32),  # equal high bits
    )
    scores = {
        f"layer{place}": torch.tensor(data.draw(st.lists(number, min_size=1, max_size=20))).float()
        for place in range(data.draw(st.integers(1, 5)))
    }
    budget = data.draw(st.integers(0, sum(score.numel() for score in scores.values())))
    counts = allocation.global_counts(scores.items, budget)
    assert counts == reference.global_counts(scores, budget)
    assert sum(counts.values()) == budget


def test_a_pattern_for_each_layer() -> None:
    assert allocation.layer_pattern(Unstructured(0.5, "layer"), 3, 12) == Unstructured(0.25, "layer")
    assert allocation.layer_pattern(NofM(1, 4), 9, 12) == NofM(1, 4)
    assert allocation.layer_pattern(NofM(1, 4), 0, 12) == Unstructured(0.0)
    with pytest.raises(Problem, match="cannot drop 8 of 12"):
        allocation.layer_pattern(NofM(1, 4), 8, 12)


@given(st.integers(1, 10**8), st.data())
def test_a_share_gives_its_number_back(weights: int, data: st.DataObject) -> None:
    dropped = data.draw(st.integers(0, weights))
    assert allocation.layer_pattern(Unstructured(0.5), dropped, weights) == Unstructured(dropped / weights)


@pytest.fixture
def project(tmp_path: Path, imported: Make, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    """A project with a tiny llama, its sensitivity table and input norms, and a text that is not looked at."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(imported("llama"), "data/taught")
    model = Checkpoint(Path("data/taught"))
    for folder in ("sensitivity", "calibration", "corpora"):
        Path("data", folder).mkdir()
    draw = torch.Generator().manual_seed(0)
    norms = {layer: torch.rand(width, generator=draw) for layer, (_, width) in model.layers.items()}
    write_tensors(Path("data/calibration/input_norms.safetensors"), norms)
    write_tensors(Path("data/corpora/calibration.safetensors"), {"tokens": torch.zeros(8, dtype=torch.int32)})
    rows = [
        (layer, block, rows * width, 0.1 * (block + 1), 0.01 * (3 - block))
        for layer, (rows, width) in model.layers.items()
        for block in [int(layer.split(".")[2])]
    ]
    table = pd.DataFrame(rows, columns=["layer", "block", "parameters", "pmpq", "outlier_ratio"])
    table.to_csv("data/sensitivity/sensitivity.csv", index=False)
    return model


def run(allocated: dict[str, Any] | None = None, **pruned: Any) -> pd.DataFrame:
    """Stage allocate with the default parameters but these; the table that it writes, by layer."""
    document = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    document["compute"] |= {"device": "cpu", "threads": 1}
    document["allocate"] |= allocated or {}
    document["prune"] |= {"method": "magnitude"} | pruned
    Path("params.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    allocate.main()
    table = pd.read_csv("data/allocation/allocation.csv")
    assert list(table.columns) == ["layer", "weights", "dropped", "sparsity", "least", "most"]
    assert table["sparsity"].tolist() == (table["dropped"] / table["weights"]).tolist()
    return table.set_index("layer")


def blocks_of(table: pd.DataFrame) -> list[float]:
    return table.groupby(table.index.str.split(".").str[2])["sparsity"].mean().tolist()


@pytest.mark.parametrize("rule", ["uniform", "owl", "pmpq", "global"])
@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_every_rule_drops_the_same_number(project: Checkpoint, rule: str, method: str) -> None:
    table = run({"rule": rule, "high": 0.8, "dense": ["*.1.self_attn.*"]}, method=method, sparsity=0.6)
    assert list(table.index) == list(project.layers)
    assert table["dropped"].sum() == round(0.6 * table["weights"].sum())
    attention = table.index.str.contains(r"\.1\.self_attn\.")
    assert (table["dropped"][attention] == 0).all()
    assert (table["sparsity"][~attention] <= 0.8).all()
    before = Path("data/allocation/allocation.csv").read_bytes()
    allocate.main()
    assert Path("data/allocation/allocation.csv").read_bytes() == before


def test_sensitive_blocks_keep_more(project: Checkpoint) -> None:
    assert blocks_of(run({"rule": "uniform"})) == pytest.approx([0.5] * 3)
    assert blocks_of(run({"rule": "owl"})) == pytest.approx([0.42, 0.5, 0.58], abs=1e-3)
    assert blocks_of(run({"rule": "pmpq", "spread": 0.1})) == pytest.approx([0.6, 0.5, 0.4], abs=1e-3)


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_global_is_one_threshold(project: Checkpoint, method: str) -> None:
    table = run({"rule": "global", "high": 0.999}, method=method, sparsity=0.55)
    tensors = all_tensors(project)
    norms = allocate.read_tensors(allocate.STATISTICS) if method == "wanda" else {}
    scores: dict[str, Tensor] = {
        layer: tensors[f"{layer}.weight"].abs().float() * norms.get(layer, torch.ones(1)) for layer in project.layers
    }
    everything = torch.cat([score.flatten() for score in scores.values()]).sort().values
    threshold = everything[round(0.55 * len(everything)) - 1]
    for layer, score in scores.items():
        assert int((score < threshold).sum()) <= table["dropped"][layer] <= int((score <= threshold).sum())
    assert table["dropped"].sum() == round(0.55 * len(everything))
    assert table["sparsity"].nunique() > 1


def test_nothing_goes_where_nothing_is_pruned(project: Checkpoint) -> None:
    assert (run({"low": 0.4, "high": 0.4}, method="none")["dropped"] == 0).all()


def test_nofm_is_uniform_but_for_dense_layers(project: Checkpoint) -> None:
    table = run({"dense": ["*.down_proj"]}, pattern="1:4", sparsity=0.75)
    down = table.index.str.endswith(".down_proj")
    assert down.sum() == 3
    assert table["sparsity"][down].tolist() == [0.0] * 3
    assert set(table["sparsity"][~down]) == {0.75}
    with pytest.raises(Problem, match=r"allocate.rule: `owl`(.|\n)*valid: uniform"):
        run({"rule": "owl"}, pattern="1:4", sparsity=0.75)


@pytest.mark.parametrize(
    ("allocated", "pruned"),
    [
        ({"rule": "global", "dense": ["*.0.self_attn.q_proj"]}, {"sparsity": 0.6, "scope": "layer"}),
        ({"dense": ["*.0.*"]}, {"sparsity": 0.5, "pattern": "2:4"}),
    ],
)
def test_prune_drops_what_allocate_says(project: Checkpoint, allocated: dict[str, Any], pruned: dict[str, Any]) -> None:
    table = run(allocated, **pruned)
    prune.main()
    masks = all_masks(Checkpoint(Path("data/pruned")))
    assert {layer: int((~keep).sum()) for layer, keep in masks.items()} == table["dropped"].to_dict()


def test_another_models_allocation_is_refused(project: Checkpoint) -> None:
    table = run()
    table.iloc[1:].to_csv("data/allocation/allocation.csv")
    with pytest.raises(Problem, match="not about the layers of this model"):
        prune.main()
