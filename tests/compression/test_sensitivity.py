"""PMPQ in one walk is PMPQ with a whole model a block; outliers are counted right; calibration sees every input."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from compression.calibration import input_norms
from compression.core import batches
from compression.core.checkpoint import Checkpoint
from compression.core.journal import Journal
from compression.core.skeleton import Skeleton
from compression.sensitivity import pmpq
from compression.sensitivity.outliers import outlier_ratio
from compression.statistics import ROWS, InputNorms
from tests import tiny
from tests.compression.helpers import Killed, make_skeleton, whole_model
from tests.conftest import Make
from tests.reference import pruning as naive
from tests.reference import sensitivity as reference


@pytest.mark.parametrize("family", ["llama", "opt", "gemma3", "bert"])
def test_pmpq_equals_one_model_a_block(family: str, imported: Make, tmp_path: Path, ids: Tensor) -> None:
    skeleton = make_skeleton(imported(family))
    scores = pmpq.measure(skeleton, ids, Journal(tmp_path), 0.6)
    causal = family != "bert"
    expected = reference.pmpq(whole_model(imported(family)), skeleton.path, ids, 0.6, causal)
    assert list(scores) == [0, 1, 2]
    assert list(scores.values()) == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert max(expected) > 0.02


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_larger_means_more_sensitive(family: str, imported: Make, tmp_path: Path, ids: Tensor) -> None:
    def measure(sparsity: float) -> list[float]:
        journal = Journal(tmp_path / str(sparsity))
        return list(pmpq.measure(make_skeleton(imported(family)), ids, journal, sparsity).values())

    nothing, little, much = measure(0.0), measure(0.3), measure(0.9)
    assert nothing == pytest.approx([0, 0, 0], abs=1e-7)
    assert all(one < two for one, two in zip(little, much, strict=True))
    assert all(score > 0 for score in much)


def test_pmpq_killed_and_resumed_gives_the_same_scores(
    imported: Make, tmp_path: Path, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = pmpq.measure(make_skeleton(imported("llama")), ids, Journal(tmp_path / "straight"), 0.5)
    load, loaded = Skeleton.load, []

    def dying(self: Skeleton, index: int) -> torch.nn.Module:
        if index == 2:
            raise Killed
        return load(self, index)

    def watched(self: Skeleton, index: int) -> torch.nn.Module:
        loaded.append(index)
        return load(self, index)

    monkeypatch.setattr(Skeleton, "load", dying)
    with pytest.raises(Killed):
        pmpq.measure(make_skeleton(imported("llama")), ids, Journal(tmp_path / "killed"), 0.5)
    skeleton = make_skeleton(imported("llama"))
    monkeypatch.setattr(Skeleton, "load", watched)
    resumed = pmpq.measure(skeleton, ids, Journal(tmp_path / "killed"), 0.5)
    assert resumed == straight
    assert loaded == [2]


def test_outlier_ratio_equals_counting() -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(9, 14, generator=draw) ** 3
    norms = torch.rand(14, generator=draw) * 5
    for threshold in (1.0, 3.0, 5.0, 1000.0):
        assert outlier_ratio(weight, norms, threshold) == reference.outlier_ratio(weight, norms, threshold)
    assert outlier_ratio(weight, norms, 3.0) > 0
    assert outlier_ratio(weight, norms, 1000.0) == 0


# Calibration.


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_norms_are_those_of_the_whole_model(family: str, imported: Make, tmp_path: Path, ids: Tensor) -> None:
    norms = input_norms(make_skeleton(imported(family)), ids, Journal(tmp_path))
    model = whole_model(imported(family))
    assert set(norms) == set(Checkpoint(imported(family)).layers)
    for layer, own in norms.items():
        expected = naive.inputs_of(model, layer, ids).double().norm(dim=0)
        torch.testing.assert_close(own.double(), expected, rtol=1e-4, atol=1e-5)


def test_norms_in_any_batch_split(imported: Make, tmp_path: Path, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = input_norms(make_skeleton(imported("opt")), ids[:5], Journal(tmp_path / "whole"))
    monkeypatch.setattr(batches, "CPU_TOKENS", 2 * ids.shape[1])
    split = input_norms(make_skeleton(imported("opt")), ids[:5], Journal(tmp_path / "split"))
    for layer, own in whole.items():
        torch.testing.assert_close(split[layer], own, rtol=1e-5, atol=1e-5)


def test_calibration_killed_and_resumed_gives_the_same_bits(
    imported: Make, tmp_path: Path, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = input_norms(make_skeleton(imported("opt")), ids, Journal(tmp_path / "straight"))
    load = Skeleton.load

    def dying(self: Skeleton, index: int) -> torch.nn.Module:
        if index == 2:
            raise Killed
        return load(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(Skeleton, "load", dying)
        with pytest.raises(Killed):
            input_norms(make_skeleton(imported("opt")), ids, Journal(tmp_path / "killed"))
    resumed = input_norms(make_skeleton(imported("opt")), ids, Journal(tmp_path / "killed"))
    assert resumed.keys() == straight.keys()
    assert all(torch.equal(resumed[layer], straight[layer]) for layer in straight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_statistic_leaves_its_input_alone(dtype: torch.dtype) -> None:
    inputs = torch.randn(2, 3, 5).to(dtype)
    before = inputs.clone()
    statistic = InputNorms(5)
    statistic.update(inputs)
    assert torch.equal(inputs, before)
    assert statistic.tokens == 6
    torch.testing.assert_close(statistic.norms(), inputs.float().flatten(0, 1).norm(dim=0))


def test_statistic_adds_up_over_many_tokens() -> None:
    inputs = torch.randn(2 * ROWS + 17, 4)
    whole, parts = InputNorms(4), InputNorms(4)
    whole.update(inputs)
    for part in inputs.split(1000):
        parts.update(part)
    torch.testing.assert_close(whole.norms().double(), inputs.double().norm(dim=0), rtol=1e-6, atol=0)
    torch.testing.assert_close(whole.norms(), parts.norms(), rtol=1e-6, atol=0)
    assert whole.tokens == parts.tokens == len(inputs)
