"""Grids and codes agree with their twin, zeros stay zero, and what is packed is what transformers computes with."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from compression.core.checkpoint import Checkpoint, CheckpointWriter
from compression.core.errors import Problem
from compression.pruning import wanda
from compression.pruning.pattern import NofM
from compression.quantization import rtn
from compression.quantization.bits import check_group_size
from compression.quantization.grid import Grid
from compression.quantization.method import Settings
from compression.quantization.packed import unpack
from tests import tiny
from tests.compression.helpers import (
    Killed,
    all_masks,
    all_tensors,
    hashes,
    prune,
    quantize,
    walked_logits,
)
from tests.conftest import Make
from tests.reference import quantization as reference

every_width = pytest.mark.parametrize("bits", [2, 3, 4, 8])
every_type = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def example(dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal weights with a pruned third, an all-zero group and an outlier."""
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))
    weight[:, ::3] = 0
    weight[2, 8:16] = 0
    weight[3, 5] = 40
    return weight.to(dtype)


def rounded(weight: Tensor, bits: int) -> tuple[Tensor, Grid]:
    done = rtn.quantize(weight, bits, Settings(8))
    return done.codes, done.grid


@every_width
@every_type
def test_equals_naive_twin(bits: int, dtype: torch.dtype) -> None:
    codes, grid = rounded(example(dtype), bits)
    naive_codes, naive_scales, naive_values = reference.rtn(example(dtype), bits, 8)
    assert codes.dtype == torch.int8
    assert grid.scale.dtype == dtype
    assert torch.equal(grid.scale, naive_scales)
    assert torch.equal(codes, naive_codes)
    assert torch.equal(grid.values(codes), naive_values)


@every_width
@every_type
def test_zero_stays_zero_and_codes_fit(bits: int, dtype: torch.dtype) -> None:
    weight = example(dtype)
    codes, grid = rounded(weight, bits)
    assert (codes[weight == 0] == 0).all()
    assert (grid.values(codes)[weight == 0] == 0).all()
    assert int(codes.min()) >= -(2 ** (bits - 1))
    assert int(codes.max()) <= 2 ** (bits - 1) - 1
    assert (grid.scale[2, 1] == 1).all()  # of the group of zeros


@every_width
@every_type
def test_values_on_the_grid_keep_their_codes(bits: int, dtype: torch.dtype) -> None:
    codes, grid = rounded(example(dtype), bits)
    assert torch.equal(grid.codes(grid.values(codes)), codes)


@every_width
def test_error_is_at_most_half_a_step(bits: int) -> None:
    weight = example()
    codes, grid = rounded(weight, bits)
    steps = (grid.values(codes) - weight).view(6, 4, 8) / grid.scale[..., None]
    assert float(steps.abs().max()) <= 0.5 + 1e-5


def transformers_logits(folder: Path, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        logits: Tensor = model(input_ids=ids).logits
        return logits


@pytest.mark.parametrize("family", tiny.PACKABLE)
def test_transformers_computes_with_what_was_packed(family: str, imported: Make, tmp_path: Path, ids: Tensor) -> None:
    pruned = prune(imported(family), tmp_path / "pruned", wanda, NofM(2, 4), ids)
    packed = quantize(pruned, tmp_path / "packed")
    theirs = transformers_logits(packed.folder, ids)
    torch.testing.assert_close(walked_logits(packed.folder, ids), theirs, rtol=1e-4, atol=1e-4)
    change = float((theirs - walked_logits(pruned.folder, ids)).norm() / theirs.norm())
    assert 1e-3 < change < 0.3  # it is quantised, and still the same model


def test_bits_scales_and_masks_on_disk(pruned: Checkpoint, quantized: Checkpoint) -> None:
    tensors, dense, keep = all_tensors(quantized), all_tensors(pruned), all_masks(quantized)
    assert {layer: mask.tolist() for layer, mask in keep.items()} == {
        layer: mask.tolist() for layer, mask in all_masks(pruned).items()
    }
    for layer, (rows, width) in quantized.layers.items():
        bits = 8 if layer.startswith("model.layers.0.") else 4
        assert tensors[f"{layer}.weight_packed"].shape == (rows, width * bits // 32)
        codes, grid = unpack(layer, tensors, bits)
        naive_codes, naive_scales, _ = reference.rtn(dense[f"{layer}.weight"], bits, 32)
        assert torch.equal(codes, naive_codes)
        assert torch.equal(grid.scale, naive_scales)
        assert (codes[~keep[layer]] == 0).all()
        assert f"{layer}.weight" not in tensors
    assert torch.equal(tensors["lm_head.weight"], dense["lm_head.weight"])


def test_group_size_that_does_not_divide_is_refused_before_work(pruned: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(Problem, match=r"group_size: 64 does not divide the 32 inputs of .*q_proj\n.*layer: 16, 32$"):
        quantize(pruned, tmp_path / "packed", 64)
    assert not list((tmp_path / "packed").glob("*.safetensors"))
    with pytest.raises(Problem, match="none of the usual ones"):
        check_group_size({"odd": [4, 30]}, 64)


def test_broken_weight_is_named(pruned: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Checkpoint.block

    def damaged(self: Checkpoint, index: int) -> dict[str, Tensor]:
        tensors = read(self, index)
        if index == 1:
            tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
        return tensors

    monkeypatch.setattr(Checkpoint, "block", damaged)
    with pytest.raises(Problem, match=r"model\.layers\.1\.mlp\.up_proj\.weight: holds NaN"):
        quantize(pruned, tmp_path / "packed")


def test_revived_weight_is_not_packed(pruned: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, read = "model.layers.1.mlp.up_proj", Checkpoint.block

    def revived(self: Checkpoint, index: int) -> dict[str, Tensor]:
        tensors = read(self, index)
        if index == 1:
            tensors[f"{layer}.weight"][~all_masks(pruned)[layer]] = 1.0
        return tensors

    monkeypatch.setattr(Checkpoint, "block", revived)
    with pytest.raises(Problem, match=rf"{layer}: 1024 pruned weights are not zero any more"):
        quantize(pruned, tmp_path / "packed")


def test_killed_and_resumed_gives_the_same_bytes(
    pruned: Checkpoint, quantized: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, written = CheckpointWriter.write_block, []

    def dying(self: CheckpointWriter, index: int, *arguments: dict[str, Tensor]) -> None:
        if index == 2:
            raise Killed
        write(self, index, *arguments)

    def watched(self: CheckpointWriter, index: int, *arguments: dict[str, Tensor]) -> None:
        written.append(index)
        write(self, index, *arguments)

    monkeypatch.setattr(CheckpointWriter, "write_block", dying)
    with pytest.raises(Killed):
        quantize(pruned, tmp_path / "packed")
    monkeypatch.setattr(CheckpointWriter, "write_block", watched)
    assert hashes(quantize(pruned, tmp_path / "packed").folder) == hashes(quantized.folder)
    assert written == [2]


def test_the_finer_grid_is_closer(pruned: Checkpoint, tmp_path: Path, ids: Tensor) -> None:
    """More bits, fewer errors: the widths really mean something on disk."""
    distances = {}
    exact = walked_logits(pruned.folder, ids)
    for width in (4, 8):
        quantize(pruned, tmp_path / f"{width}", bits=width)
        distances[width] = float((walked_logits(tmp_path / f"{width}", ids) - exact).norm() / exact.norm())
    assert distances[8] < distances[4] / 8
