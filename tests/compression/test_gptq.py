"""GPTQ agrees with its twin, keeps masks, and loses less than rounding to nearest."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from compression.core.checkpoint import Checkpoint
from compression.quantization import gptq, rtn
from compression.quantization.method import Settings
from compression.statistics import Gram
from tests.compression.helpers import all_masks, quantize, walked_logits
from tests.reference import obs
from tests.reference import quantization as reference

DEAD = 5  # an input that is always zero


def layer(width: int = 32, rows: int = 12, seed: int = 0) -> tuple[Tensor, Tensor, Gram]:
    """W [rows, width], correlated inputs [400, width] of unlike loudness, and their statistic."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=draw)
    inputs = torch.randn(400, width, generator=draw) @ torch.randn(width, width, generator=draw)
    inputs *= torch.rand(width, generator=draw) + 0.1
    inputs[:, DEAD] = 0
    statistic = Gram(width)
    statistic.update(inputs)
    return weight, inputs, statistic


def mask(weight: Tensor) -> Tensor:
    return torch.rand(weight.shape, generator=torch.Generator().manual_seed(9)) > 0.5


@pytest.mark.parametrize("masked", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("order", ["natural", "activation"])
@pytest.mark.parametrize("clip", [False, True], ids=["span", "clip"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [3, 4])
def test_equals_naive_twin(bits: int, symmetric: bool, clip: bool, order: str, masked: bool) -> None:
    weight, inputs, statistic = layer()
    weight[:, DEAD] = 0
    keep = mask(weight) if masked else None
    done = gptq.quantize(weight, bits, Settings(8, symmetric, clip, order), statistic, keep)  # type: ignore[arg-type]
    H, values, loudest = obs.hessian(inputs, 0.01), done.grid.values(done.codes), order == "activation"
    twin = reference.gptq(weight, H, bits, 8, symmetric, clip, loudest, keep, ties_as=values)
    torch.testing.assert_close(values.double(), twin, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", ["natural", "activation"])
@pytest.mark.parametrize("group_size", [12, 16, 24, 48])
def test_groups_of_any_size_equal_the_twin(group_size: int, order: str) -> None:
    """Grids see all updates of the columns before their group, wherever strips begin."""
    weight, inputs, statistic = layer(width=48)
    weight[:, DEAD] = 0
    done = gptq.quantize(weight, 4, Settings(group_size, order=order), statistic)  # type: ignore[arg-type]
    H, values = obs.hessian(inputs, 0.01), done.grid.values(done.codes)
    twin = reference.gptq(weight, H, 4, group_size, by_activation=order == "activation", ties_as=values)
    torch.testing.assert_close(values.double(), twin, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", ["natural", "activation"])
def test_loud_weights_of_an_input_that_never_speaks_cost_nothing(order: str) -> None:
    weight, inputs, statistic = layer()
    weight[:, DEAD] = 30
    done = gptq.quantize(weight, 4, Settings(8, order=order), statistic)  # type: ignore[arg-type]
    values = done.grid.values(done.codes)
    assert (values[:, DEAD] == 0).all()
    assert obs.layer_error(weight, values, inputs) < 0.01


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group_size", [8, "row", "tensor"])
@pytest.mark.parametrize("order", ["natural", "activation"])
def test_loses_less_than_rounding_to_nearest(symmetric: bool, group_size: int | str, order: str) -> None:
    weight, inputs, statistic = layer()
    settings = Settings(group_size, symmetric, True, order)  # type: ignore[arg-type]
    errors = []
    for done in (gptq.quantize(weight, 3, settings, statistic), rtn.quantize(weight, 3, settings)):
        errors.append(obs.layer_error(weight, done.grid.values(done.codes), inputs))
    assert errors[0] < 0.7 * errors[1]


def test_pruned_weights_stay_zero_and_kept_ones_make_up_for_it() -> None:
    weight, inputs, statistic = layer()
    keep = mask(weight)
    pruned = weight * keep
    for symmetric in (True, False):
        settings = Settings(8, symmetric)
        done = gptq.quantize(pruned, 3, settings, statistic, keep)
        values = done.grid.values(done.codes)
        assert (values[~keep] == 0).all()
        assert done.grid.zeros(done.codes)[~keep].all()
        nearest = rtn.quantize(pruned, 3, settings).grid.nearest(pruned)
        assert obs.layer_error(pruned, values, inputs) < obs.layer_error(pruned, nearest, inputs)


def test_the_noted_error_is_the_error() -> None:
    weight, inputs, statistic = layer()
    weight[:, DEAD] = 0
    done = gptq.quantize(weight, 4, Settings(8, damping=1e-6), statistic)
    error = obs.layer_error(weight, done.grid.values(done.codes), inputs)
    assert done.notes["error"] == pytest.approx(error, rel=0.02)


def test_a_width_beyond_a_block_of_columns_is_swept_to_its_end() -> None:
    """Groups of 48 do not divide a block of 128 columns: blocks give way."""
    weight, inputs, statistic = layer(width=288, rows=4)
    for group_size in (48, 96):
        done = gptq.quantize(weight, 3, Settings(group_size), statistic)
        nearest = rtn.quantize(weight, 3, Settings(group_size))
        assert done.grid.scale.shape == nearest.grid.scale.shape
        errors = [obs.layer_error(weight, one.grid.values(one.codes), inputs) for one in (done, nearest)]
        assert errors[0] < 0.7 * errors[1]


def test_bfloat16_weights_get_bfloat16_scales_and_codes_that_fit_them() -> None:
    weight, _, statistic = layer()
    weight[:, DEAD] = 0
    done = gptq.quantize(weight.bfloat16(), 8, Settings(8), statistic)
    assert done.grid.scale.dtype == torch.bfloat16
    assert float((done.grid.values(done.codes).float() - weight).abs().max()) < 0.2


def test_model_is_closer_than_rounded_and_masks_hold(pruned: Checkpoint, tmp_path: Path, ids: Tensor) -> None:
    exact = walked_logits(pruned.folder, ids)
    distance = {}
    for method in (rtn, gptq):
        name = method.__name__.rpartition(".")[2]
        done = quantize(pruned, tmp_path / name, method=method, first=4, ids=ids)
        distance[name] = float((walked_logits(done.folder, ids) - exact).norm())
        assert all(torch.equal(own, all_masks(done)[layer]) for layer, own in all_masks(pruned).items())
    assert distance["gptq"] < 0.9 * distance["rtn"]
