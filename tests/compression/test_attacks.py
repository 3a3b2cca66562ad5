"""Attacks change the weights that are read, and nothing on disk."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from compression.attacks.pruning import pruned
from compression.attacks.relearning import relearned
from compression.attacks.requantizing import requantized
from compression.core.checkpoint import Checkpoint
from compression.core.errors import Problem
from compression.core.journal import Journal
from compression.core.skeleton import Skeleton
from compression.evaluation.memorisation import memorisation
from compression.pruning import magnitude
from compression.pruning.pattern import Unstructured
from compression.quantization.packed import block_reader, plain_outer
from compression.training.loop import Recipe
from compression.training.samples import Samples, whole_text
from tests import tiny
from tests.compression.helpers import CPU, prune, quantize
from tests.conftest import Make

RECIPE = Recipe(steps=30, learning_rate=1e-2, warmup=0.1, clip=1.0)


@pytest.fixture(scope="module")
def source(imported: Make, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A tiny Llama, half its weights pruned, the rest at 8 bits."""
    folder = tmp_path_factory.mktemp("attacked")
    half = prune(imported("llama"), folder / "pruned", magnitude, Unstructured(0.5), tiny.encode(tiny.sentences(1, 20)))
    return quantize(half, folder / "quantized", bits=8)


@pytest.fixture(scope="module")
def unseen() -> Samples:
    """What the model was never taught."""
    lines = ["Nobody knows why zebras jump over xylophones. ", "Quick brown foxes vex dwarfs by juggling waltzes. "]
    return whole_text(tiny.encode("".join(lines) * 8), prompt=8)


def weights(source: Checkpoint, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {f"{layer}.weight" for layer in source.layers}
    return {name: tensor for name, tensor in tensors.items() if name in names}


def test_requantized_weights_are_the_nearest_of_few_and_zeros_stay(source: Checkpoint) -> None:
    read = block_reader(source)
    before, after = weights(source, read(1)), weights(source, requantized(read, source.layers, 2, 32)(1))
    assert before
    assert before.keys() == after.keys()
    for name, weight in before.items():
        groups = weight.reshape(len(weight), -1, 32).float()
        scale = groups.abs().amax(-1, keepdim=True) / 1.5
        wanted = (groups / scale).round().clamp(-2, 1) * scale
        assert torch.allclose(after[name].reshape(groups.shape).float(), wanted, atol=1e-2 * weight.abs().max().item())
        assert not after[name][weight == 0].any()
        assert all(len(row.unique()) <= 4 for row in after[name].reshape(-1, 32))


def test_a_group_that_does_not_fit_is_told(source: Checkpoint) -> None:
    with pytest.raises(Problem, match=r"attack\.group_size"):
        requantized(block_reader(source), source.layers, 4, 24)(0)


def test_pruned_weights_are_the_smallest_of_each_row(source: Checkpoint) -> None:
    read = block_reader(source)
    before, after = weights(source, read(0)), weights(source, pruned(read, source.layers, 0.75)(0))
    for name, weight in before.items():
        gone = after[name] == 0
        assert gone.sum() == round(0.75 * weight.numel())
        for row, lost in zip(weight.abs(), gone, strict=True):
            assert row[lost].max() <= row[~lost].min()


def test_attacks_leave_other_tensors_alone(source: Checkpoint) -> None:
    read = block_reader(source)
    for attacked in (requantized(read, source.layers, 4, 32), pruned(read, source.layers, 0.75)):
        before, after = read(2), attacked(2)
        others = before.keys() - weights(source, before).keys()
        assert others
        assert all(before[name].equal(after[name]) for name in others)


def relearn(source: Checkpoint, samples: Samples, folder: Path) -> dict[str, Tensor]:
    reader = relearned(source, samples, RECIPE, 2, 4, 1, Journal(folder), CPU, torch.float32)
    return {name: tensor for index in range(source.depth) for name, tensor in reader(index).items()}


def test_relearning_brings_back_what_it_is_shown(source: Checkpoint, unseen: Samples, tmp_path: Path) -> None:
    reader = relearned(source, unseen, RECIPE, 2, 4, 1, Journal(tmp_path), CPU, torch.float32)
    loss = [
        memorisation(Skeleton(source.folder, plain_outer(source), read, CPU, torch.float32), {"forget": unseen})
        for read in (block_reader(source), reader)
    ]
    assert loss[1]["forget"]["loss"] < loss[0]["forget"]["loss"] - 1
    assert loss[1]["forget"]["exact_memorisation"] > loss[0]["forget"]["exact_memorisation"]


def test_relearning_is_the_same_every_time(source: Checkpoint, unseen: Samples, tmp_path: Path) -> None:
    first, second = (relearn(source, unseen, tmp_path / name) for name in ("a", "b"))
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)


def test_an_attacker_keeps_no_mask(source: Checkpoint, unseen: Samples, tmp_path: Path) -> None:
    """An attack that spared pruned weights would be weaker than what anyone may do."""
    after = relearn(source, unseen, tmp_path)
    before = {name: tensor for index in range(source.depth) for name, tensor in block_reader(source)(index).items()}
    assert any(((tensor == 0) & (after[name] != 0)).any() for name, tensor in weights(source, before).items())
