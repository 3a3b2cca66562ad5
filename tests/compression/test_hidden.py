"""A narrower residual stream gives the logits of the one whose other dimensions are zero."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from compression.core.checkpoint import Checkpoint, CheckpointWriter, block_file
from compression.core.errors import Problem
from compression.core.files import read_tensors
from compression.evaluation.size import measure_size
from compression.surgeon.hidden import hidden_axes, narrow, remove_dimensions
from compression.surgeon.shrink import STRUCTURES
from tests.compression.helpers import all_masks, lineage, walked_logits, whole_logits
from tests.conftest import Make

KEPT = torch.tensor([dimension for dimension in range(32) if dimension % 4 != 1])
GONE = torch.arange(1, 32, 4)


def silenced(source: Checkpoint, folder: Path) -> Checkpoint:
    """The model with every fourth dimension zero, in its old shapes."""
    axes, writer = hidden_axes(source, len(KEPT)), CheckpointWriter(folder, source.folder)
    for index in range(source.depth):
        writer.write_block(index, remove_dimensions(source.block(index), axes, GONE))
    writer.write_outer(remove_dimensions(source.outer(), axes, GONE))
    writer.finish(source.depth, lineage(source))
    return Checkpoint(folder)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_narrower_model_gives_the_logits_of_the_silenced_one(
    family: str, imported: Make, tmp_path: Path, ids: Tensor
) -> None:
    source = Checkpoint(imported(family))
    wide = silenced(source, tmp_path / "silenced")
    writer = CheckpointWriter(tmp_path / "narrow", wide.folder)
    told = narrow(wide, writer, KEPT)
    writer.finish(source.depth, lineage(source) | {"layers": told.layers}, told.config)
    small, expected = Checkpoint(tmp_path / "narrow"), whole_logits(wide.folder, ids)
    torch.testing.assert_close(whole_logits(small.folder, ids), expected, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(walked_logits(small.folder, ids), expected, rtol=1e-4, atol=1e-4)
    assert (expected - whole_logits(source.folder, ids)).abs().max() > 0.1
    assert small.layers["model.layers.1.self_attn.o_proj"] == [24, 32]
    assert small.layers["model.layers.1.mlp.gate_proj"] == [64, 24]
    assert all(mask.all() for mask in all_masks(small).values())
    before, after = measure_size(wide), measure_size(small)
    assert after["prunable_parameters"] == 0.75 * before["prunable_parameters"]
    assert read_tensors(small.folder / STRUCTURES)["hidden"].tolist() == KEPT.tolist()


def test_eps_is_that_of_fewer_dimensions(imported: Make, tmp_path: Path, ids: Tensor) -> None:
    """Seen where states are so small that eps matters."""
    source = Checkpoint(imported("llama"))
    wide = silenced(source, tmp_path / "silenced")
    writer = CheckpointWriter(tmp_path / "faint", wide.folder)
    writer.write_outer({name: t * 1e-3 if "embed" in name else t for name, t in wide.outer().items()})
    for index in range(3):
        tensors = wide.block(index)
        ends = (".o_proj.weight", ".down_proj.weight")
        writer.write_block(index, {name: t * 1e-3 if name.endswith(ends) else t for name, t in tensors.items()})
    writer.finish(3, lineage(source))
    faint = Checkpoint(tmp_path / "faint")
    writer = CheckpointWriter(tmp_path / "narrow", faint.folder)
    told = narrow(faint, writer, KEPT)
    writer.finish(3, lineage(source) | {"layers": told.layers}, told.config)
    assert told.config["rms_norm_eps"] == pytest.approx(1e-6 * 32 / 24)
    expected = whole_logits(faint.folder, ids)
    torch.testing.assert_close(whole_logits(tmp_path / "narrow", ids), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("family", ["opt", "bert", "gpt_neox", "gemma2", "gemma3"])
def test_other_norms_and_scaled_embeddings_are_refused(family: str, imported: Make) -> None:
    with pytest.raises(Problem, match=r"cannot change\n.*valid: models of RMS norms"):
        hidden_axes(Checkpoint(imported(family)), 24)


def test_width_that_heads_do_not_divide_is_refused(imported: Make) -> None:
    with pytest.raises(Problem, match=r"takes no hidden width of 22 with 4 heads\n.*multiples of 4"):
        hidden_axes(Checkpoint(imported("llama")), 22)


def test_dimension_that_is_still_written_is_refused(imported: Make, tmp_path: Path) -> None:
    source = Checkpoint(imported("llama"))
    with pytest.raises(Problem, match=r"(o|down)_proj\.weight: still writes dimensions that are to go"):
        narrow(source, CheckpointWriter(tmp_path / "one", source.folder), KEPT)
    wide = silenced(source, tmp_path / "silenced")
    writer = CheckpointWriter(tmp_path / "in", wide.folder)
    for index in range(3):
        writer.link(wide, block_file(index))
    writer.write_outer(source.outer())
    writer.finish(3, lineage(source))
    with pytest.raises(Problem, match=r"embed_tokens\.weight: still writes"):
        narrow(Checkpoint(tmp_path / "in"), CheckpointWriter(tmp_path / "two", source.folder), KEPT)
