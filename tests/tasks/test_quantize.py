"""Stage quantize: which scheme each layer gets, and scales that are tuned behind the rounding."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from compression.core.checkpoint import Checkpoint
from compression.core.errors import Problem
from compression.core.files import write_tensors, write_text
from compression.quantization import tune
from compression.quantization.scheme import Scheme
from tasks import quantize
from tasks.params.base import load, read
from tasks.params.quantize import Quantize
from tasks.quantize import all_schemes
from tests import tiny
from tests.compression.helpers import Killed, hashes
from tests.conftest import Make
from tests.imports import ROOT

TUNE = {"steps": 14, "sequences": 2, "length": tiny.LENGTH, "held_out": 4, "check_every": 7}


def params(**changes: object) -> Quantize:
    return read(Quantize, {"quantize": load()["quantize"] | changes})


def test_an_embedding_of_8_bits_among_other_layers_has_a_scale_a_row() -> None:
    wanted = params(embeddings=8, group_size=64, symmetric=False)
    assert all_schemes(wanted, {"a": 4, "b": 16}, "e") == {"e": Scheme(8, "row"), "a": Scheme(4, 64, False)}


def test_an_embedding_like_all_layers_has_their_grid() -> None:
    wanted = params(embeddings=8, group_size=64, symmetric=False)
    assert all_schemes(wanted, {"a": 8}, "e") == dict.fromkeys("ea", Scheme(8, 64, False))


def test_no_embedding_is_rounded_unless_asked() -> None:
    assert all_schemes(params(embeddings=None, group_size=64, symmetric=True), {"a": 4}, "e") == {"a": Scheme(4, 64)}


@pytest.fixture
def project(request: pytest.FixtureRequest, tmp_path: Path, imported: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A workspace with a tiny model, as it is and as it was retrained, whose params.yaml tunes."""
    for switch in ("set_num_threads", "use_deterministic_algorithms"):  # they would outlive the test
        monkeypatch.setattr(torch, switch, lambda *_, **__: None)
    monkeypatch.chdir(tmp_path)
    for name in ("taught", "retrained"):
        shutil.copytree(imported(getattr(request, "param", "llama")), f"data/{name}")
    for name in ("sensitivity", "corpora"):
        Path("data", name).mkdir()
    write_text(Path("data/sensitivity/sensitivity.csv"), "layer\n")
    for role in ("training", "calibration"):
        tokens = tiny.encode(tiny.sentences(1, 120)).flatten()
        write_tensors(Path(f"data/corpora/{role}.safetensors"), {"tokens": tokens})
    document: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    document["compute"] = {"device": "cpu", "dtype": "float32", "threads": 1}
    document["quantize"] |= {"plan": "uniform", "bits": 3, "group_size": 32, "sequences": 4, "length": tiny.LENGTH}
    document["quantize"]["tune"] |= TUNE
    Path("params.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")


def test_a_kill_while_scales_learn_costs_no_rounding(project: None, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize.main()
    whole, looks = hashes(Path("data/quantized")), training()["held_out"]
    assert min(looks) < looks[0]
    shutil.rmtree("data/quantized")
    inner, calls = tune.distillation_loss, []

    def dying(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 4 + 7 + 4 + 5:  # looks at four sequences each; the journal has ten steps
            raise Killed
        return inner(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(tune, "distillation_loss", dying)
        with pytest.raises(Killed):
            quantize.main()
    assert not Path("data/quantized").exists()
    with monkeypatch.context() as patch:
        patch.setattr("compression.quantization.gptq.quantize", None)  # rounding again would fail
        quantize.main()
    assert hashes(Path("data/quantized")) == whole
    assert training()["held_out"] == looks


def training() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path("data/quantized/manifest.json").read_text(encoding="utf-8"))["training"]
    return found


@pytest.mark.parametrize("project", ["bert"], indirect=True)
def test_scales_of_an_encoder_are_refused_before_anything_is_rounded(project: None) -> None:
    with pytest.raises(Problem, match="an encoder cannot be trained on next-token loss"):
        quantize.main()
    assert not list(Path(".work").rglob("block-*"))


def test_nothing_is_tuned_unless_asked(project: None) -> None:
    document = load()
    document["quantize"]["tune"]["steps"] = 0
    Path("params.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    quantize.main()
    assert "training" not in Checkpoint(Path("data/quantized")).manifest
