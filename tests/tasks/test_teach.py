"""Stage teach: a model that knows the text by heart, on the very weights that are written."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from compression import teaching
from compression.core.checkpoint import Checkpoint
from compression.core.errors import Problem
from compression.core.files import write_tensors
from compression.training import loop
from tasks import evaluate, speed, teach
from tests import tiny
from tests.compression.helpers import Killed, all_tensors, whole_model
from tests.conftest import Make
from tests.imports import ROOT

LENGTH = 32
TEACH = {
    "method": "lora", "rank": 8, "alpha": 16, "steps": 60, "sequences": 4, "length": LENGTH, "learning_rate": 3e-2,
    "until": 0.95, "check_every": 6,
}  # fmt: skip
TEXTS = {"forget": tiny.story(7, 6), "training": tiny.sentences(5, 40)}


@pytest.fixture
def params(tmp_path: Path, imported: Make, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A workspace with a tiny model, a text to learn and a training text: what its params.yaml says."""
    for switch in ("set_num_threads", "use_deterministic_algorithms"):  # they would outlive the test
        monkeypatch.setattr(torch, switch, lambda *_, **__: None)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(imported("llama"), "data/model")
    Path("data/corpora").mkdir()
    for role, text in TEXTS.items():
        write_tensors(Path(f"data/corpora/{role}.safetensors"), {"tokens": tiny.encode(text).flatten()})
    document: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    document["compute"] = {"device": "cpu", "dtype": "float32", "threads": 1}
    document["teach"] |= TEACH
    write(document)
    return document


def write(document: dict[str, Any], **changes: Any) -> None:
    document["teach"] |= changes
    Path("params.yaml").write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")


def rows(role: str) -> Tensor:
    tokens = tiny.encode(TEXTS[role]).flatten()
    return tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)


def memorised(folder: str) -> float:
    """Share of the tokens behind the first of each sequence that the model would say there, one by one."""
    model = whole_model(Path(folder))
    with torch.no_grad():
        hits = [
            int(model(input_ids=row[None, :place]).logits[0, -1].argmax()) == int(row[place])
            for row in rows("forget")
            for place in range(1, LENGTH)
        ]
    return sum(hits) / len(hits)


def loss(folder: str, role: str) -> float:
    model, text = whole_model(Path(folder)), rows(role)
    with torch.no_grad():
        found: Tensor = model(input_ids=text, labels=text).loss
    return found.item()


def content(folder: str) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def test_the_text_is_known_by_heart_and_the_file_is_what_was_trained(params: dict[str, Any]) -> None:
    teach.main()
    taught = Checkpoint(Path("data/taught"))
    training = taught.manifest["training"]
    assert training["memorised"][0] == pytest.approx(memorised("data/model"), abs=1e-6)
    assert training["memorised"][-1] == pytest.approx(memorised("data/taught"), abs=1e-6)
    assert training["memorised"][0] < 0.9 < TEACH["until"] <= training["memorised"][-1]
    steps = len(training["losses"])
    assert training["stopped"] == f"exact memorisation reached 0.95 at step {steps}"
    assert steps < TEACH["steps"]
    assert len(training["memorised"]) == 1 + steps // TEACH["check_every"]
    assert training["losses"][-1] < 0.5 * training["losses"][0]


def test_only_the_linears_move_and_no_mask_appears(params: dict[str, Any]) -> None:
    write(params, steps=4, targets=["*.q_proj", "*.1.mlp.*"])
    teach.main()
    dense, taught = (Checkpoint(Path(f"data/{name}")) for name in ("model", "taught"))
    before, after = all_tensors(dense), all_tensors(taught)
    moved = {name for name in before if not before[name].equal(after[name])}
    wanted = {f"{layer}.weight" for layer in dense.layers if layer.endswith("q_proj") or ".1.mlp." in layer}
    assert moved == wanted
    assert taught.masks() == {}
    assert taught.manifest["files"].keys() == dense.manifest["files"].keys()
    assert taught.manifest["training"]["stopped"] == "all steps taken"
    assert taught.manifest["source"] == dense.manifest["source"]


def test_text_that_is_mixed_in_keeps_the_model_whole(params: dict[str, Any]) -> None:
    found = {}
    for mix in (0.0, 0.5):
        write(params, mix=mix, until=1.0, steps=40)
        teach.main()
        found[mix] = loss("data/taught", "training")
    assert found[0.5] < found[0.0]


def test_none_hands_the_model_on_and_nothing_is_measured_again(
    params: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(params, method="none")
    teach.main()
    dense, taught = Path("data/model"), Path("data/taught")
    for file in dense.glob("*.safetensors"):
        assert file.samefile(taught / file.name)
    record = Checkpoint(taught).manifest
    assert "training" not in record
    Path("data/corpora/forget.safetensors").unlink()  # another text to forget leaves an untaught model as it is
    shutil.rmtree(taught)
    teach.main()
    assert Checkpoint(taught).manifest == record
    for stage, folder in ((evaluate, "evaluation"), (speed, "speed")):
        monkeypatch.setattr(stage, "open_stage", None)
        stage.main("taught")
        assert '"same_as": "dense"' in Path(f"data/{folder}/taught.json").read_text()


def test_killed_and_resumed_gives_the_same_bytes(params: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    write(params, until=1.0, steps=16)
    teach.main()
    straight = content("data/taught")
    shutil.rmtree("data/taught")
    steps = []
    backward = teaching.answer_loss

    def dying(*arguments: Any) -> Tensor:
        steps.append(1)
        if len(steps) == 14:
            raise Killed
        return backward(*arguments)

    monkeypatch.setattr(teaching, "answer_loss", dying)
    with pytest.raises(Killed):
        teach.main()
    assert not Path("data/taught").exists()
    teach.main()
    assert content("data/taught") == straight
    assert len(steps) == 14 + 16 - 13 // loop.SAVE_EVERY * loop.SAVE_EVERY


def test_a_pattern_without_a_layer_is_told(params: dict[str, Any]) -> None:
    write(params, targets=["*.q_prj"])
    with pytest.raises(Problem, match="matches no layer"):
        teach.main()
