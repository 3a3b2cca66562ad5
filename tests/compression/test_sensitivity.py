"""Measures in one walk are those of whole models; outliers are counted right; calibration sees every input."""

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from compression.calibration import input_norms
from compression.core import batches
from compression.core.checkpoint import Checkpoint
from compression.core.errors import Problem
from compression.core.journal import Journal
from compression.core.skeleton import Skeleton
from compression.sensitivity import branches, measured, noise, pmpq, tdmpq
from compression.sensitivity.outliers import outlier_ratio
from compression.sensitivity.settings import Columns, Settings
from compression.statistics import ENTRIES, InputNorms
from tests import tiny
from tests.compression.helpers import Killed, make_skeleton, whole_model
from tests.conftest import Make
from tests.reference import pruning as naive
from tests.reference import sensitivity as reference

SETTINGS = Settings(sparsity=0.6, widths=(4, 2), group_size=16)
PER_LAYER = Settings(per="layer", sparsity=0.6, widths=(4, 2), group_size=16)
PER = pytest.mark.parametrize("settings", [SETTINGS, PER_LAYER], ids=["block", "layer"])


def measure(
    method: ModuleType,
    folder: Path,
    tmp_path: Path,
    ids: Tensor,
    settings: Settings,
    dtype: torch.dtype = torch.float32,
) -> Columns:
    columns: Columns = method.measure(make_skeleton(folder, dtype), ids, Journal(tmp_path), settings)
    assert all(set(values) == set(Checkpoint(folder).layers) for values in columns.values())
    return columns


@PER
@pytest.mark.parametrize("family", ["llama", "opt", "gemma3", "bert"])
def test_pmpq_equals_one_model_a_part(
    family: str, settings: Settings, imported: Make, tmp_path: Path, ids: Tensor
) -> None:
    columns = measure(pmpq, imported(family), tmp_path, ids, settings)
    model, path = whole_model(imported(family)), make_skeleton(imported(family)).path
    expected = reference.pmpq(model, path, ids, 0.6, family != "bert", settings.per)
    assert list(columns) == ["pmpq"]
    assert columns["pmpq"] == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert max(expected.values()) > 0.01  # far above the tolerance
    assert len(set(expected.values())) == (3 if settings.per == "block" else len(expected))


@PER
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_noise_equals_one_model_a_part(
    family: str, settings: Settings, imported: Make, tmp_path: Path, ids: Tensor
) -> None:
    columns = measure(noise, imported(family), tmp_path, ids, replace(settings, noise=0.5))
    model, path = whole_model(imported(family)), make_skeleton(imported(family)).path
    assert list(columns) == ["noise"]
    expected = reference.noise(model, path, ids, 0.5, noise.DRAWS, settings.per)
    assert columns["noise"] == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert max(expected.values()) > 0.01


@PER
@pytest.mark.parametrize("family", ["llama", "opt", "bert"])
def test_measured_equals_one_model_a_part(
    family: str, settings: Settings, imported: Make, tmp_path: Path, ids: Tensor
) -> None:
    columns = measure(measured, imported(family), tmp_path, ids, settings)
    model, path = whole_model(imported(family)), make_skeleton(imported(family)).path
    assert list(columns) == ["measured", "cost_4", "cost_2"]
    for bits in (4, 2):
        expected = reference.measured(model, path, ids, bits, 16, family != "bert", settings.per)
        if bits == 2:
            assert columns["measured"] == pytest.approx(expected, rel=1e-3, abs=1e-4)
            assert max(expected.values()) > 0.02
        for part, layers in reference.parts(model, path, settings.per):
            whole = sum(columns[f"cost_{bits}"][layer] for layer in layers)
            assert whole == pytest.approx(expected[layers[0]], rel=1e-3, abs=1e-4), part
            sizes = [model.get_parameter(f"{layer}.weight").numel() for layer in layers]
            shares = [columns[f"cost_{bits}"][layer] / size for layer, size in zip(layers, sizes, strict=True)]
            assert shares == pytest.approx([shares[0]] * len(layers), rel=1e-6)


@pytest.mark.parametrize("family", ["llama", "opt", "gemma3", "gpt_neox"])
def test_tdmpq_equals_gradients_of_the_whole_model(family: str, imported: Make, tmp_path: Path, ids: Tensor) -> None:
    columns = measure(tdmpq, imported(family), tmp_path, ids, PER_LAYER)
    model, path = whole_model(imported(family)), make_skeleton(imported(family)).path
    assert list(columns) == ["tdmpq", "cost_4", "cost_2"]
    for bits in (4, 2):
        expected = reference.tdmpq(model, path, ids, bits, 16)
        assert columns[f"cost_{bits}"] == pytest.approx(expected, rel=1e-3)
    assert columns["tdmpq"] == columns["cost_2"]


def test_tdmpq_of_a_block_is_the_sum_of_its_layers(imported: Make, tmp_path: Path, ids: Tensor) -> None:
    layers = measure(tdmpq, imported("llama"), tmp_path / "layers", ids, PER_LAYER)
    blocks = measure(tdmpq, imported("llama"), tmp_path / "blocks", ids, SETTINGS)
    assert blocks["cost_4"] == layers["cost_4"]
    for layer, score in blocks["tdmpq"].items():
        block = layer.split(".")[2]
        assert score == pytest.approx(
            sum(cost for name, cost in layers["tdmpq"].items() if name.split(".")[2] == block)
        )


def test_tdmpq_foretells_what_is_measured(imported: Make, tmp_path: Path, ids: Tensor) -> None:
    """Also in size: costs are nats, not scores."""
    foretold = measure(tdmpq, imported("llama"), tmp_path / "tdmpq", ids, PER_LAYER)["cost_2"]
    true = measure(measured, imported("llama"), tmp_path / "measured", ids, PER_LAYER)["cost_2"]
    ranks = [torch.tensor([own[layer] for layer in true]).argsort().argsort().double() for own in (foretold, true)]
    assert torch.corrcoef(torch.stack(ranks))[0, 1] > 0.6
    assert 0.5 < sum(foretold.values()) / sum(true.values()) < 3


def test_tdmpq_in_bfloat16(imported: Make, tmp_path: Path, ids: Tensor) -> None:
    exact = measure(tdmpq, imported("llama"), tmp_path / "exact", ids, PER_LAYER)["cost_2"]
    rough = measure(tdmpq, imported("llama"), tmp_path / "rough", ids, PER_LAYER, torch.bfloat16)["cost_2"]
    whole = sum(exact.values())
    # Near the middle between two codes a weight may go either way.
    assert rough == pytest.approx(exact, rel=0.2, abs=0.02 * whole)
    assert sum(rough.values()) == pytest.approx(whole, rel=0.05)


@pytest.mark.parametrize("method", [tdmpq, measured])
def test_groups_that_do_not_divide_are_told(method: ModuleType, imported: Make, tmp_path: Path, ids: Tensor) -> None:
    with pytest.raises(Problem, match=r"sensitivity.group_size: 24 does not divide the 32 inputs"):
        measure(method, imported("llama"), tmp_path, ids, Settings(group_size=24))


@pytest.mark.parametrize(("method", "family"), [(pmpq, "llama"), (measured, "bert")])
def test_few_branches_at_a_time_give_the_same_scores(
    method: ModuleType, family: str, imported: Make, tmp_path: Path, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = measure(method, imported(family), tmp_path / "together", ids, PER_LAYER)
    states = make_skeleton(imported(family)).begin(ids).nbytes
    for branch in (1, 4):
        monkeypatch.setattr(branches, "ALIVE", branch * states)
        assert measure(method, imported(family), tmp_path / str(branch), ids, PER_LAYER) == together


def test_branches_do_not_outgrow_their_room(
    imported: Make, tmp_path: Path, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = make_skeleton(imported("llama")).begin(ids).nbytes
    monkeypatch.setattr(branches, "ALIVE", 4 * states + states // 2)
    save, alive = Journal.save, []

    def counting(self: Journal, finished: int, state: dict[str, Tensor]) -> None:
        alive.append(sum(name.startswith("branch.") for name in state))
        save(self, finished, state)

    monkeypatch.setattr(Journal, "save", counting)
    measure(pmpq, imported("llama"), tmp_path, ids, PER_LAYER)
    assert max(alive) == 4


@pytest.mark.parametrize("method", [pmpq, measured, tdmpq])
def test_in_any_batch_split(
    method: ModuleType, imported: Make, tmp_path: Path, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = measure(method, imported("opt"), tmp_path / "whole", ids[:5], SETTINGS)
    monkeypatch.setattr(batches, "CPU_TOKENS", 2 * ids.shape[1])
    split = measure(method, imported("opt"), tmp_path / "split", ids[:5], SETTINGS)
    for column, values in whole.items():
        assert split[column] == pytest.approx(values, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_larger_means_more_sensitive(family: str, imported: Make, tmp_path: Path, ids: Tensor) -> None:
    def pruned(sparsity: float) -> list[float]:
        settings = Settings(sparsity=sparsity)
        return list(measure(pmpq, imported(family), tmp_path / str(sparsity), ids, settings)["pmpq"].values())

    nothing, little, much = pruned(0.0), pruned(0.3), pruned(0.9)
    assert nothing == pytest.approx([0] * len(nothing), abs=1e-7)
    assert all(one < two for one, two in zip(little, much, strict=True))
    assert all(score > 0 for score in much)


@pytest.mark.parametrize("method", [pmpq, measured, tdmpq])
@pytest.mark.parametrize("after", [1, 4, 6])
def test_killed_and_resumed_gives_the_same_scores(
    method: ModuleType, after: int, imported: Make, tmp_path: Path, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = make_skeleton(imported("llama")).begin(ids).nbytes
    monkeypatch.setattr(branches, "ALIVE", 9 * states)
    straight = measure(method, imported("llama"), tmp_path / "straight", ids, PER_LAYER)
    load, loads = Skeleton.load, []

    def dying(self: Skeleton, index: int) -> torch.nn.Module:
        loads.append(index)
        if len(loads) == after:
            raise Killed
        return load(self, index)

    skeletons = [make_skeleton(imported("llama")) for _ in range(2)]
    monkeypatch.setattr(Skeleton, "load", dying)
    with pytest.raises(Killed):
        method.measure(skeletons[0], ids, Journal(tmp_path / "killed"), PER_LAYER)
    assert method.measure(skeletons[1], ids, Journal(tmp_path / "killed"), PER_LAYER) == straight


def test_a_resumed_walk_reads_no_block_again(
    imported: Make, tmp_path: Path, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    skeletons = [make_skeleton(imported("llama")) for _ in range(2)]
    load, loaded = Skeleton.load, []

    def dying(self: Skeleton, index: int) -> torch.nn.Module:
        if index == 2 and self is skeletons[0]:
            raise Killed
        loaded.append(index)
        return load(self, index)

    monkeypatch.setattr(Skeleton, "load", dying)
    with pytest.raises(Killed):
        pmpq.measure(skeletons[0], ids, Journal(tmp_path), SETTINGS)
    pmpq.measure(skeletons[1], ids, Journal(tmp_path), SETTINGS)
    assert loaded == [0, 1, 2]


def test_outlier_ratio_equals_counting() -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(9, 14, generator=draw) ** 3
    norms = torch.rand(14, generator=draw) * 5
    for threshold in (1.0, 3.0, 5.0, 1000.0):
        assert outlier_ratio(weight, norms, threshold) == reference.outlier_ratio(weight, norms, threshold)
    assert outlier_ratio(weight, norms, 3.0) > 0
    assert outlier_ratio(weight, norms, 1000.0) == 0


# Calibration.


@pytest.mark.parametrize("family", tiny.PLAIN)
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
    inputs = torch.randn(2 * ENTRIES // 4 + 17, 4)
    whole, parts = InputNorms(4), InputNorms(4)
    whole.update(inputs)
    for part in inputs.split(1000):
        parts.update(part)
    torch.testing.assert_close(whole.norms().double(), inputs.double().norm(dim=0), rtol=1e-6, atol=0)
    torch.testing.assert_close(whole.norms(), parts.norms(), rtol=1e-6, atol=0)
    assert whole.tokens == parts.tokens == len(inputs)
