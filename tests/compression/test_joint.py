"""Pruning and rounding in one pass: the grid that SparseGPT leaves is the one that is packed."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from compression.core.checkpoint import Checkpoint
from compression.core.errors import Problem
from compression.pruning import sparsegpt
from compression.pruning.method import Settings
from compression.pruning.pattern import Unstructured
from compression.quantization import given
from compression.quantization.grid import Grid
from compression.quantization.method import Settings as GridSettings
from tests.compression.helpers import all_masks, prune, quantize, walked_logits
from tests.conftest import Make


def rounded(source: Path, target: Path, ids: Tensor) -> Checkpoint:
    """A llama that SparseGPT has halved and put on a grid of 4 bits, in one pass."""
    return prune(source, target, sparsegpt, Unstructured(0.5, "columns"), ids, settings=Settings(bits=4, group_size=16))


def test_the_grid_of_a_joint_pass_is_packed_as_it_is(imported: Make, tmp_path: Path, ids: Tensor) -> None:
    source = rounded(imported("llama"), tmp_path / "rounded", ids)
    assert set(source.scales()) == set(source.layers)
    packed = quantize(source, tmp_path / "packed", 16, given, 4)
    assert torch.equal(walked_logits(packed.folder, ids), walked_logits(source.folder, ids))
    assert "scales.safetensors" not in packed.manifest["files"]
    assert all(torch.equal(mask, all_masks(source)[layer]) for layer, mask in all_masks(packed).items())


def test_no_grid_or_one_that_weights_have_left_is_told(
    pruned: Checkpoint, imported: Make, tmp_path: Path, ids: Tensor
) -> None:
    with pytest.raises(Problem, match="`given` needs a checkpoint that was pruned on to a symmetric grid"):
        quantize(pruned, tmp_path / "none", 32, given, 4)
    weight, grid = torch.tensor([[0.5, 0.0, 0.25, 1.0]]), Grid(4, torch.tensor([[0.25]]))
    codes = given.quantize(weight, 4, GridSettings(4), given=grid).codes
    assert codes.tolist() == [[2, 0, 1, 4]]
    with pytest.raises(Problem, match="do not lie on the grid"):
        given.quantize(weight + 0.01, 4, GridSettings(4), given=grid)
