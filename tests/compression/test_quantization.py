"""Grids and codes agree with their twin, zeros stay zero, and what is packed is what transformers computes with."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from compression.core.checkpoint import Checkpoint, CheckpointWriter
from compression.core.errors import Problem
from compression.importing import import_model
from compression.pruning import wanda
from compression.pruning.pattern import NofM
from compression.quantization import rtn
from compression.quantization.bits import bits_by_sensitivity, check_group_size
from compression.quantization.grid import Grid
from compression.quantization.packed import block_reader, pack, plain_weights, unpack
from compression.quantization.run import quantize_model
from tests import tiny
from tests.compression.helpers import (
    Killed,
    all_masks,
    all_tensors,
    hashes,
    journal,
    lineage,
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


@every_width
@every_type
def test_equals_naive_twin(bits: int, dtype: torch.dtype) -> None:
    codes, grid = rtn.quantize(example(dtype), bits, 8)
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
    codes, grid = rtn.quantize(weight, bits, 8)
    assert (codes[weight == 0] == 0).all()
    assert (grid.values(codes)[weight == 0] == 0).all()
    assert int(codes.min()) >= -(2 ** (bits - 1))
    assert int(codes.max()) <= 2 ** (bits - 1) - 1
    assert (grid.scale[2, 1] == 1).all()  # of the group of zeros


@every_width
@every_type
def test_values_on_the_grid_keep_their_codes(bits: int, dtype: torch.dtype) -> None:
    codes, grid = rtn.quantize(example(dtype), bits, 8)
    assert torch.equal(grid.codes(grid.values(codes)), codes)


@every_width
def test_error_is_at_most_half_a_step(bits: int) -> None:
    weight = example()
    codes, grid = rtn.quantize(weight, bits, 8)
    steps = (grid.values(codes) - weight).view(6, 4, 8) / grid.scale[..., None]
    assert float(steps.abs().max()) <= 0.5 + 1e-5


@given(st.data())
@settings(deadline=None, max_examples=40)
def test_pack_round_trip(data: st.DataObject) -> None:
    bits = data.draw(st.sampled_from([4, 8]))
    rows, groups = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    numbers = st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    size = rows * groups * 16
    codes = torch.tensor(data.draw(st.lists(numbers, min_size=size, max_size=size)), dtype=torch.int8)
    codes = codes.view(rows, groups * 16)
    grid = Grid(bits, torch.rand(rows, groups) + 0.1)
    tensors = pack("a.b", codes, grid)
    assert tensors["a.b.weight_packed"].numel() * 32 == size * bits  # int32, no bit wasted
    again, same_grid = unpack("a.b", tensors, bits)
    assert torch.equal(again, codes)
    assert same_grid.bits == bits
    assert torch.equal(same_grid.scale, grid.scale)


def test_plain_weights_touches_packed_layers_only() -> None:
    codes, grid = rtn.quantize(example(), 4, 8)
    others = {"a.bias": torch.ones(6), "norm.weight": torch.ones(3), "c.weight": torch.ones(2, 2)}
    plain = plain_weights(pack("a", codes, grid) | others, {"a": 4})
    assert set(plain) == {"a.weight", *others}
    assert torch.equal(plain["a.weight"], grid.values(codes))
    assert all(torch.equal(plain[name], tensor) for name, tensor in others.items())


def transformers_logits(folder: Path, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        logits: Tensor = model(input_ids=ids).logits
        return logits


@pytest.mark.parametrize("family", tiny.CAUSAL)
def test_transformers_computes_with_what_was_packed(family: str, imported: Make, tmp_path: Path, ids: Tensor) -> None:
    pruned = prune(imported(family), tmp_path / "pruned", wanda, NofM(2, 4), ids)
    packed = quantize(pruned, tmp_path / "packed")
    theirs = transformers_logits(packed.folder, ids)
    torch.testing.assert_close(walked_logits(packed.folder, ids), theirs, rtol=1e-4, atol=1e-4)
    change = float((theirs - walked_logits(pruned.folder, ids)).norm() / theirs.norm())
    assert 1e-3 < change < 0.3  # it is quantised, and still the same model


def test_bfloat16_scales_are_read_alike(original: Make, tmp_path: Path, ids: Tensor) -> None:
    """The scale is stored in bfloat16: our values have to be those that transformers unpacks, to the bit."""
    import_model(original("llama"), tmp_path / "half", "bfloat16", {})
    packed = quantize(Checkpoint(tmp_path / "half"), tmp_path / "packed")
    model = AutoModelForCausalLM.from_pretrained(packed.folder, dtype=torch.bfloat16)
    model(input_ids=ids[:1, :2])  # the first pass unpacks
    plain = {name: t for index in range(packed.depth) for name, t in block_reader(packed)(index).items()}
    for layer in packed.layers:
        assert torch.equal(model.get_parameter(f"{layer}.weight"), plain[f"{layer}.weight"])


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
        writer = CheckpointWriter(tmp_path / f"{width}", pruned.folder)
        bits = dict.fromkeys(pruned.layers, width)
        quantize_model(pruned, writer, journal(tmp_path / f"{width}"), rtn, bits, 32)
        writer.finish(pruned.depth, lineage(pruned) | {"quantization": {"bits": bits, "group_size": 32}})
        distances[width] = float((walked_logits(tmp_path / f"{width}", ids) - exact).norm() / exact.norm())
    assert distances[8] < distances[4] / 8


SCORES = {0: 0.5, 1: 3.0, 2: -1.0, 3: 3.0, 4: 0.1}
LAYERS = {f"b{block}.{name}": block for block in SCORES for name in ("q", "up")}


def test_most_sensitive_blocks_get_more_bits() -> None:
    chosen = []
    for share in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        bits = bits_by_sensitivity(SCORES, LAYERS, share, 4, 8)
        assert list(bits) == list(LAYERS)
        assert all(bits[f"b{block}.q"] == bits[f"b{block}.up"] for block in SCORES)
        chosen.append({block for block in SCORES if bits[f"b{block}.q"] == 8})
    assert chosen == [set(), {1}, {1, 3}, {0, 1, 3}, {0, 1, 3, 4}, {0, 1, 2, 3, 4}]
