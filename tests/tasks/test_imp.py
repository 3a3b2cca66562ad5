"""Iterative magnitude pruning as its stage runs it: cycles on disk, each from the one before."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from compression.core.checkpoint import Checkpoint
from compression.core.errors import Problem
from compression.core.files import write_tensors
from compression.core.masks import revived
from compression.retraining import run as retraining
from tasks import allocate, imp, prune
from tests import tiny
from tests.compression.helpers import Killed, all_masks, all_tensors
from tests.conftest import Make
from tests.imports import ROOT

CYCLES = {
    "first": {"source": "data/taught", "sparsity": 0.4},
    "second": {"source": "data/imp/first", "sparsity": 0.5},
}
RETRAIN = {"rank": 4, "alpha": 8, "steps": 14, "length": tiny.LENGTH, "learning_rate": 5e-3}


@pytest.fixture
def params(tmp_path: Path, imported: Make, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A workspace with a tiny model and a training text: what its params.yaml says."""
    for switch in ("set_num_threads", "use_deterministic_algorithms"):  # they would outlive the test
        monkeypatch.setattr(torch, switch, lambda *_, **__: None)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(imported("llama"), "data/taught")
    Path("data/corpora").mkdir()
    for role in ("training", "calibration"):
        write_tensors(
            Path(f"data/corpora/{role}.safetensors"), {"tokens": tiny.encode(tiny.sentences(1, 120)).flatten()}
        )
    document: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    document["compute"] = {"device": "cpu", "dtype": "float32", "threads": 1}
    document["imp"] = {"cycles": CYCLES, "retrain": document["imp"]["retrain"] | RETRAIN}
    write(document)
    return document


def write(document: dict[str, Any]) -> None:
    Path("params.yaml").write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")


def read(folder: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and masks of a checkpoint's layers."""
    checkpoint = Checkpoint(Path(folder))
    tensors = all_tensors(checkpoint)
    return {layer: tensors[f"{layer}.weight"] for layer in checkpoint.layers}, all_masks(checkpoint)


def content(folder: str) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def test_masks_only_grow_and_the_weights_learn(params: dict[str, Any]) -> None:
    before, so_far = read("data/taught")
    for name, cycle in CYCLES.items():
        imp.main(name)
        after, keep = read(f"data/imp/{name}")
        assert keep.keys() == after.keys()
        for layer, mask in keep.items():
            assert int((~mask).sum()) == round(cycle["sparsity"] * mask.numel())
            assert revived(after[layer], mask) == 0
            assert not (after[layer] - before[layer])[mask].eq(0).any()
            assert not (mask & ~so_far.get(layer, mask)).any()
            # The lowest of what the cycle before has left go, after its retraining.
            left = before[layer].abs()[so_far.get(layer, torch.ones_like(mask))]
            assert before[layer].abs()[mask].min() >= left.sort().values[-int(mask.sum())]
        before, so_far = after, keep
    assert not any(Path(".work").glob("*/*"))


@pytest.mark.parametrize("sparsity", [0.4, 0.6])
def test_prune_goes_on_from_a_cycle(params: dict[str, Any], sparsity: float) -> None:
    """With the same sparsity, too: then allocation rounds in its own way, and the cycle's mask has to stand."""
    imp.main("first")
    params["prune"] |= {"source": "data/imp/first", "method": "magnitude", "sparsity": sparsity}
    write(params)
    allocate.main()
    prune.main()
    before, so_far = read("data/imp/first")
    after, keep = read("data/pruned")
    for layer, mask in keep.items():
        assert abs(int((~mask).sum()) - sparsity * mask.numel()) < 1
        assert not (mask & ~so_far[layer]).any()
        assert torch.equal(after[layer], before[layer] * mask)


def test_killed_while_it_retrains_and_resumed_gives_the_same_bytes(
    params: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    imp.main("first")
    imp.main("second")
    straight = content("data/imp/second")
    shutil.rmtree("data/imp/second")
    steps, pruned = [], []
    loss, prune_layer = retraining.next_token_loss, imp.magnitude.prune

    def dying(*arguments: Any) -> Tensor:
        steps.append(1)
        if len(steps) == 13:
            raise Killed
        return loss(*arguments)

    def counted(*arguments: Any) -> Any:
        pruned.append(1)
        return prune_layer(*arguments)

    monkeypatch.setattr(retraining, "next_token_loss", dying)
    monkeypatch.setattr(imp.magnitude, "prune", counted)
    with pytest.raises(Killed):
        imp.main("second")
    assert not Path("data/imp/second").exists()
    imp.main("second")
    assert content("data/imp/second") == straight
    assert len(steps) == 13 + 4 + 2  # it went on at step 10
    assert len(pruned) == len(Checkpoint(Path("data/taught")).layers)  # and pruned once only


def test_a_cycle_does_not_depend_on_the_others(params: dict[str, Any]) -> None:
    """DVC runs a cycle again for its own parameters only, so no others may decide about its bytes."""
    imp.main("first")
    alone = content("data/imp/first")
    params["imp"]["cycles"] = {"first": CYCLES["first"]}
    write(params)
    imp.main("first")
    assert content("data/imp/first") == alone


def test_without_retraining_a_cycle_only_prunes(params: dict[str, Any]) -> None:
    params["imp"]["retrain"]["method"] = "none"
    write(params)
    imp.main("first")
    before, _ = read("data/taught")
    after, keep = read("data/imp/first")
    assert all(torch.equal(after[layer], before[layer] * mask) for layer, mask in keep.items())


def test_an_unknown_cycle_is_told(params: dict[str, Any]) -> None:
    with pytest.raises(Problem, match="there is no cycle `third`"):
        imp.main("third")
