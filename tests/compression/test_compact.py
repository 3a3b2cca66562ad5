"""The compact form holds what the mask keeps and no more, and gives the checkpoint back to the byte."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor

from compression.core.checkpoint import Checkpoint, CheckpointWriter, block_file
from compression.core.errors import Problem
from compression.evaluation.size import measure_size
from compression.export import compact
from compression.pruning import wanda
from compression.pruning.pattern import NofM
from compression.quantization.grid import GroupSize, fit_grid
from compression.quantization.packed import pack
from compression.quantization.scheme import Scheme, anatomy, config_entry, layouts, pack_outer, to_manifest
from tests.compression.helpers import all_masks, all_tensors, hashes, lineage, prune, whole_logits
from tests.conftest import Make


def on_grids(source: Checkpoint, folder: Path, *schemes: Scheme) -> Checkpoint:
    """A sparse checkpoint rounded to nearest, its blocks by these schemes in turn, its embedding on 8 bits."""
    model = anatomy(source.folder)
    of = {
        layer: schemes[int(layer.removeprefix(f"{source.blocks}.").partition(".")[0]) % len(schemes)]
        for layer in source.layers
    } | {model.embedding: Scheme(8, "row")}
    kinds, writer, packed = layouts(of, model), CheckpointWriter(folder, source.folder), source.masks()

    def rounded(tensors: dict[str, torch.Tensor], layer: str) -> tuple[torch.Tensor, object]:
        weight, scheme = tensors[f"{layer}.weight"], of[layer]
        grid = fit_grid(weight, scheme.bits, scheme.group_size, scheme.symmetric)
        return grid.codes(weight), grid

    outer = source.outer()
    writer.write_outer(pack_outer(outer, {model.embedding: rounded(outer, model.embedding)}, kinds, model))  # type: ignore[dict-item]
    for index in range(source.depth):
        tensors = source.block(index)
        for layer in [layer for layer in source.layers if f"{layer}.weight" in tensors]:
            codes, grid = rounded(tensors, layer)
            del tensors[f"{layer}.weight"]
            tensors |= pack(layer, codes, grid, kinds[layer])  # type: ignore[arg-type]
        writer.write_block(index, tensors, source.block_masks(index, packed))
    config = source.config() | {"quantization_config": config_entry(of, model)}
    writer.finish(source.depth, lineage(source) | {"quantization": to_manifest(of)}, config)
    return Checkpoint(folder)


def comes_back(checkpoint: Checkpoint, folder: Path) -> dict[str, float]:
    """Proves that the checkpoint is given back, file for file; returns the figures."""
    figures = compact.write(checkpoint, folder / "compact")
    again = compact.restore(folder / "compact", folder / "again")
    assert again.manifest == checkpoint.manifest
    assert hashes(again.folder) == hashes(checkpoint.folder)
    tensors, keep = compact.read(folder / "compact")
    stored, masks = all_tensors(checkpoint), all_masks(checkpoint)
    assert tensors.keys() == stored.keys()
    assert all(tensors[name].dtype == tensor.dtype for name, tensor in stored.items())
    assert all(torch.equal(tensors[name], tensor) for name, tensor in stored.items())
    assert keep.keys() == masks.keys()
    assert all(torch.equal(keep[layer], mask) for layer, mask in masks.items())
    return figures


def positive(checkpoint: Checkpoint, folder: Path, dtype: torch.dtype = torch.float32) -> Checkpoint:
    """The same without -0, in another type."""
    writer, packed = CheckpointWriter(folder, checkpoint.folder), checkpoint.masks()
    writer.write_outer(checkpoint.outer())
    for index in range(checkpoint.depth):
        tensors = {name: tensor.to(dtype) + 0.0 for name, tensor in checkpoint.block(index).items()}
        writer.write_block(index, tensors, checkpoint.block_masks(index, packed))
    writer.finish(checkpoint.depth, lineage(checkpoint))
    return Checkpoint(folder)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group_size", [16, "row", "tensor"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_codes_come_back(bits: int, group_size: GroupSize, symmetric: bool, pruned: Checkpoint, tmp_path: Path) -> None:
    if group_size == "row" and not symmetric:
        group_size = 32  # transformers loads no such rows beside an embedding on 8 bits
    comes_back(on_grids(pruned, tmp_path / "packed", Scheme(bits, group_size, symmetric)), tmp_path)


def test_mixed_widths_come_back(pruned: Checkpoint, tmp_path: Path) -> None:
    comes_back(on_grids(pruned, tmp_path / "packed", Scheme(3, 16), Scheme(4, 32, False), Scheme(8, "row")), tmp_path)


def test_what_quantising_writes_comes_back(quantized: Checkpoint, tmp_path: Path) -> None:
    figures = comes_back(quantized, tmp_path)
    assert figures["bytes_before"] == measure_size(quantized)["bytes"]
    assert figures["bits_per_weight"] == 8 * figures["bytes"] / measure_size(quantized)["parameters"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sparse_weights_come_back(dtype: torch.dtype, pruned: Checkpoint, tmp_path: Path) -> None:
    figures = comes_back(positive(pruned, tmp_path / "sparse", dtype), tmp_path)
    assert figures["bytes"] < figures["bytes_before"]


def test_a_negative_zero_comes_back_as_zero(pruned: Checkpoint, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    assert (pruned.block(1)[name].signbit() & (pruned.block(1)[name] == 0)).any()
    compact.write(pruned, tmp_path / "compact")
    again = compact.restore(tmp_path / "compact", tmp_path / "again").block(1)[name]
    assert torch.equal(again, pruned.block(1)[name])
    assert not (again.signbit() & (again == 0)).any()


def test_bytes_are_a_bit_a_weight_and_what_is_kept(imported: Make, tmp_path: Path, ids: torch.Tensor) -> None:
    """2 of 4 weights on 8 bits: 1 + 4 bits a weight in place of 8, and scales."""
    sparse = prune(imported("llama"), tmp_path / "sparse", wanda, NofM(2, 4), ids)
    packed = on_grids(sparse, tmp_path / "packed", Scheme(8, "tensor"))
    compact.write(packed, tmp_path / "compact")
    block, before = (
        sum(t.nbytes for t in read_block(place).values()) for place in (tmp_path / "compact", packed.folder)
    )
    weights = sum(rows * width for layer, (rows, width) in packed.layers.items() if ".layers.0." in layer)
    assert before - block == weights * (8 - (1 + 4)) // 8


def read_block(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / block_file(0))


def test_restored_checkpoint_is_what_transformers_loads(
    quantized: Checkpoint, tmp_path: Path, ids: torch.Tensor
) -> None:
    compact.write(quantized, tmp_path / "compact")
    compact.restore(tmp_path / "compact", tmp_path / "again")
    assert torch.equal(whole_logits(tmp_path / "again", ids), whole_logits(quantized.folder, ids))


def test_dense_checkpoint_is_refused(imported: Make, tmp_path: Path) -> None:
    with pytest.raises(Problem, match="has no masks"):
        compact.write(Checkpoint(imported("llama")), tmp_path / "compact")
    assert not (tmp_path / "compact").exists()


def test_revived_weight_is_refused(quantized: Checkpoint, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(quantized.folder, folder)
    writer, layer = CheckpointWriter(folder, quantized.folder), "model.layers.1.mlp.up_proj"
    tensors = quantized.block(1)
    tensors[f"{layer}.weight_packed"][0, 0] = -1  # the highest codes
    writer.write_block(1, tensors)
    writer.finish(quantized.depth, {key: quantized.manifest[key] for key in ("blocks", "layers", "quantization")})
    with pytest.raises(Problem, match=rf"{layer}: \d+ pruned weights are not zero any more"):
        compact.write(Checkpoint(folder), tmp_path / "compact")


@pytest.mark.parametrize("name", [block_file(1), "outer.safetensors", "config.json"])
def test_cut_or_changed_file_is_named(name: str, quantized: Checkpoint, tmp_path: Path) -> None:
    compact.write(quantized, tmp_path / "compact")
    whole = (tmp_path / "compact" / name).read_bytes()
    for broken in (whole[: len(whole) // 2], whole[:-1] + bytes([whole[-1] ^ 1])):
        (tmp_path / "compact" / name).write_bytes(broken)
        with pytest.raises(Problem, match=name):
            compact.restore(tmp_path / "compact", tmp_path / "again")
    (tmp_path / "compact" / name).unlink()
    with pytest.raises(Problem, match=rf"{name}: the file is missing"):
        compact.restore(tmp_path / "compact", tmp_path / "again")


def test_folder_that_is_no_compact_form_is_refused(quantized: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(Problem, match="no compact checkpoint here"):
        compact.read(quantized.folder)
    (tmp_path / compact.COMPACT).write_text("{")
    with pytest.raises(Problem, match="not JSON"):
        compact.read(tmp_path)
    (tmp_path / compact.COMPACT).write_text(json.dumps({"version": 9}))
    with pytest.raises(Problem, match="version 9 is not known"):
        compact.read(tmp_path)


def test_compressed_tensors_has_no_such_format_itself() -> None:
    """When it has one again, ours is not needed any more."""
    assert "sparse-bitmask" not in BaseCompressor.registered_names()
