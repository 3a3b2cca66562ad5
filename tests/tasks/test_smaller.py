"""A model that stage prune has made smaller goes through the stages behind it."""

import json
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
from compression.quantization.packed import block_reader
from tasks import allocate, calibrate, evaluate, prune, quantize, retrain, sensitivity, teach
from tasks.check import problems
from tests import tiny
from tests.compression.helpers import all_masks, hashes, whole_model
from tests.conftest import Make
from tests.imports import ROOT

LENGTH = 32
SMALL: dict[str, dict[str, Any]] = {
    "compute": {"device": "cpu", "dtype": "float32", "threads": 1},
    "calibrate": {"sequences": 4, "length": LENGTH},
    "sensitivity": {"method": "none"},
    "prune": {"method": "surgeon", "pattern": "units+heads", "sparsity": 0.2, "sequences": 8, "length": LENGTH},
    "surgeon": {"shots": 1, "multiple": 16},
    "retrain": {"rank": 4, "steps": 4, "sequences": 2, "length": LENGTH},
    "quantize": {
        "group_size": 16, "sequences": 8, "length": LENGTH, "plan": "budget", "by": "outlier_ratio",
        "average_bits": 6.0,
    },
    "evaluate": {
        "windows": 4, "length": LENGTH, "forget_windows": 2, "forget_length": LENGTH, "prompt": 8, "answers": 0,
    },
}  # fmt: skip
STAGES = ["pruned", "retrained", "quantized"]


@pytest.fixture
def params(tmp_path: Path, imported: Make, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A workspace with a tiny model that is taught nothing, its statistics and texts: what its params.yaml says."""
    for switch in ("set_num_threads", "use_deterministic_algorithms"):  # they would outlive the test
        monkeypatch.setattr(torch, switch, lambda *_, **__: None)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(imported("llama"), "data/model")
    Path("data/corpora/evaluation").mkdir(parents=True)
    texts = {
        "calibration": tiny.sentences(1, 40),
        "training": tiny.sentences(2, 40),
        "retained": tiny.sentences(3, 40),
        "forget": tiny.story(1, 10),
        "control": tiny.story(2, 10),
        "evaluation/sea": tiny.sentences(4, 40),
    }
    for role, text in texts.items():
        write_tensors(Path(f"data/corpora/{role}.safetensors"), {"tokens": tiny.encode(text).flatten()})
    Path("data/classifier").mkdir()
    Path("data/classifier/classifier.json").write_text("{}")  # asked only where the text to forget is questions
    document: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    for section, values in SMALL.items():
        document[section] |= values
    write(document)
    for stage in (teach, calibrate, sensitivity):
        stage.main()
    return document


def write(document: dict[str, Any], **changes: dict[str, Any]) -> None:
    for section, values in changes.items():
        document[section] |= values
    Path("params.yaml").write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")


def checkpoint(name: str) -> Checkpoint:
    return Checkpoint(Path("data") / name)


def evaluated(name: str) -> dict[str, Any]:
    evaluate.main(name)
    figures: dict[str, Any] = json.loads(Path(f"data/evaluation/{name}.json").read_text())
    return figures


def perplexity(folder: str) -> float:
    """As a user gets it who loads the checkpoint with transformers."""
    model, rows = whole_model(Path(folder)), tiny.encode(tiny.sentences(4, 40)).view(-1, LENGTH)[:4]
    with torch.no_grad():
        loss: torch.Tensor = model(input_ids=rows, labels=rows).loss
    return loss.exp().item()


@pytest.mark.parametrize("objective", ["next_token", "block"])
@pytest.mark.parametrize(("rule", "sparsity"), [("uniform", 0.2), ("global", 0.4)])
def test_a_smaller_model_goes_through_the_stages(
    params: dict[str, Any], rule: str, sparsity: float, objective: str
) -> None:
    write(params, allocate={"rule": rule}, prune={"sparsity": sparsity}, retrain={"objective": objective})
    for stage in (allocate, prune, retrain, quantize):
        stage.main()
    dense, pruned = checkpoint("model"), checkpoint("pruned")
    figures = {"dense": evaluated("dense")} | {name: evaluated(name) for name in STAGES}
    whole = figures["dense"]["prunable_parameters"]
    padding = pruned.manifest["shrunk"]["padding"]
    assert pruned.manifest["shrunk"]["layers"] == dense.layers
    for name in STAGES:
        own = figures[name]
        assert checkpoint(name).layers == pruned.layers != dense.layers
        assert hashes(checkpoint(name).folder)["masks.safetensors"] == hashes(pruned.folder)["masks.safetensors"]
        assert own["prunable_parameters"] - padding <= (1 - sparsity) * whole
        assert own["parameters"] < figures["dense"]["parameters"]
        assert own["bytes"] < figures["dense"]["bytes"]
        assert own["sparsity"] == pytest.approx(padding / own["prunable_parameters"])
        assert own["revived_weights"] == 0
        assert own["perplexity"]["sea"] == pytest.approx(perplexity(f"data/{name}"), rel=1e-3)
    assert figures["retrained"]["perplexity"]["sea"] != figures["pruned"]["perplexity"]["sea"]
    assert figures["quantized"]["bytes"] < figures["retrained"]["bytes"]
    assert (padding > 0) == (rule == "global")
    keep, read = all_masks(pruned), block_reader(checkpoint("quantized"))
    for index in range(pruned.depth):
        for name, tensor in read(index).items():
            if (layer := name.removesuffix(".weight")) in keep:
                assert not tensor[~keep[layer]].any()


def test_bits_are_dealt_out_to_the_weights_that_are_left(params: dict[str, Any]) -> None:
    """The budget counts what is stored, though the sensitivity table is about the dense model."""
    for stage in (allocate, prune, retrain, quantize):
        stage.main()
    quantized = checkpoint("quantized")
    sizes = {layer: rows * width for layer, (rows, width) in quantized.layers.items()}
    table = pd.read_csv("data/sensitivity/sensitivity.csv", index_col="layer")["parameters"]
    assert sum(sizes.values()) < table.sum()
    bits = quantized.manifest["quantization"]["bits"]
    assert 5 < sum(bits[layer] * size for layer, size in sizes.items()) / sum(sizes.values()) <= 6


def test_groups_that_a_smaller_attention_does_not_fill_are_told_before_the_run(params: dict[str, Any]) -> None:
    """Both heads of a key/value head write 16 columns of o_proj; with one left, groups of 32 find no place."""
    write(params, quantize={"group_size": 32}, surgeon={"multiple": 32})
    layers = checkpoint("model").layers
    found = [str(problem) for problem in problems(params, layers) if "quantize.group_size" in str(problem)]
    assert ["32 does not divide the 16 outputs of a key/value head's queries" in fault for fault in found] == [True]
    for changes in ({"quantize": {"group_size": 16}}, {"prune": {"pattern": "units"}}, {"prune": {"method": "wanda"}}):
        changed = {section: values | changes.get(section, {}) for section, values in params.items()}
        assert not any("key/value" in str(problem) for problem in problems(changed, layers))


def test_groups_that_do_not_fit_cost_no_other_stage(params: dict[str, Any]) -> None:
    """Whoever starts stage quantize all the same is told at once, and goes on from what was retrained."""
    write(params, prune={"pattern": "heads", "sparsity": 0.1}, quantize={"group_size": 32})
    for stage in (allocate, prune, retrain):
        stage.main()
    before = hashes(Path("data/retrained"))
    with pytest.raises(Problem, match=r"quantize\.group_size: 32 does not divide the 16 inputs of .*o_proj") as told:
        quantize.main()
    assert "sizes that divide every layer: 16" in told.value.valid
    assert hashes(Path("data/retrained")) == before
    write(params, quantize={"group_size": 16})
    quantize.main()
    assert checkpoint("quantized").layers == checkpoint("pruned").layers
