"""Unlearning on the weights that ship: what is forgotten is forgotten on disk, mask and grid stay as they are."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from compression.core.checkpoint import Checkpoint, CheckpointWriter
from compression.core.masks import revived
from compression.quantization.method import Settings
from compression.quantization.packed import unpack
from compression.training.loop import Recipe
from compression.unlearning import gradient_ascent
from compression.unlearning import run as unlearning
from tests import tiny
from tests.compression.helpers import (
    CPU,
    Killed,
    all_masks,
    all_tensors,
    hashes,
    journal,
    lineage,
    quantize,
    walked_logits,
    whole_logits,
)

OPTIONS = {
    "rank": 4,
    "alpha": 8.0,
    "seed": 1,
    "forget_ceiling": 1e9,
    "forget_weight": 1.0,
    "retain_weight": 2.0,
}
RECIPE = Recipe(steps=25, learning_rate=1e-2, warmup=0.1, clip=1.0)


@pytest.fixture(scope="module")
def forget() -> Tensor:
    return tiny.encode(tiny.story(1, 20))


@pytest.fixture(scope="module")
def retain() -> Tensor:
    return tiny.encode(tiny.sentences(1, 60))


def unlearn(
    source: Checkpoint, target: Path, forget: Tensor, retain: Tensor, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[Checkpoint, dict[str, Any]]:
    writer = CheckpointWriter(target, source.folder)
    record = unlearning.unlearn_model(
        source,
        writer,
        journal(target),
        gradient_ascent,
        OPTIONS | options,
        RECIPE,
        forget,
        retain,
        2,
        CPU,
        dtype,
    )
    writer.finish(source.depth, lineage(source))
    return Checkpoint(target), record


def loss(checkpoint: Checkpoint, ids: Tensor) -> float:
    logits = walked_logits(checkpoint.folder, ids)[:, :-1].flatten(0, 1)
    return float(F.cross_entropy(logits, ids[:, 1:].flatten()))


def bits(checkpoint: Checkpoint) -> dict[str, int]:
    widths: dict[str, int] = checkpoint.manifest["quantization"]["bits"]
    return widths


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forgets_on_disk_and_spares_the_rest(
    dtype: torch.dtype, quantized: Checkpoint, tmp_path: Path, forget: Tensor, retain: Tensor, ids: Tensor
) -> None:
    unlearned, record = unlearn(quantized, tmp_path / "unlearned", forget, retain, dtype)
    risen = loss(unlearned, forget) - loss(quantized, forget)
    spared = loss(unlearned, ids) - loss(quantized, ids)  # held out of training
    assert risen > 0.5
    assert spared < risen / 4
    assert record["forget_losses"][-1] > record["forget_losses"][0] + 0.5
    assert len(record["retain_losses"]) == 25
    assert record["stopped"] == "all steps taken"


def test_mask_and_grid_stay(quantized: Checkpoint, tmp_path: Path, forget: Tensor, retain: Tensor) -> None:
    unlearned, record = unlearn(quantized, tmp_path / "unlearned", forget, retain)
    before, after, keep = all_tensors(quantized), all_tensors(unlearned), all_masks(unlearned)
    assert before.keys() == after.keys()
    assert hashes(unlearned.folder)["masks.safetensors"] == hashes(quantized.folder)["masks.safetensors"]
    moved = total = 0
    for layer, width in bits(quantized).items():
        old, new = unpack(layer, before, width)[0], unpack(layer, after, width)[0]
        assert revived(new, keep[layer]) == 0
        moved, total = moved + int((old != new).sum()), total + old.numel()
    packed = {f"{layer}.weight_packed" for layer in bits(quantized)}
    assert all(torch.equal(before[name], after[name]) for name in before if name not in packed)  # scales, norms, head
    assert record["changed_codes"] == moved / total
    assert 0 < moved < total


def test_what_is_trained_is_what_is_written(
    quantized: Checkpoint, tmp_path: Path, forget: Tensor, retain: Tensor
) -> None:
    """The loss of the last step is measured before its update: one step more from disk begins where it ended."""
    unlearned, record = unlearn(quantized, tmp_path / "unlearned", forget, retain, forget_ceiling=2.5)
    last = len(record["forget_losses"])
    again, more = unlearn(unlearned, tmp_path / "again", forget, retain, forget_ceiling=-1.0)
    sequences = unlearning.Shuffled(forget, 2, 1)(0)
    assert more["forget_losses"] == pytest.approx([loss(unlearned, sequences)], abs=1e-4)
    assert last < 25
    assert again.depth == 3


def test_stop_rule_fires(quantized: Checkpoint, tmp_path: Path, forget: Tensor, retain: Tensor) -> None:
    _, record = unlearn(quantized, tmp_path / "unlearned", forget, retain, forget_ceiling=2.5)
    losses = record["forget_losses"]
    assert losses[-1] >= 2.5
    assert max(losses[:-1]) < 2.5
    assert record["stopped"] == f"forget loss reached 2.5 at step {len(losses)}"


def test_without_ascent_nothing_is_forgotten(
    quantized: Checkpoint, tmp_path: Path, forget: Tensor, retain: Tensor, ids: Tensor
) -> None:
    unlearned, _ = unlearn(quantized, tmp_path / "unlearned", forget, retain, forget_weight=0.0)
    assert loss(unlearned, ids) < loss(quantized, ids)


def test_plain_weights_unlearn_too(
    pruned: Checkpoint, tmp_path: Path, forget: Tensor, retain: Tensor, ids: Tensor
) -> None:
    unlearned, record = unlearn(pruned, tmp_path / "unlearned", forget, retain)
    tensors = all_tensors(unlearned)
    assert all(revived(tensors[f"{layer}.weight"], mask) == 0 for layer, mask in all_masks(unlearned).items())
    assert loss(unlearned, forget) - loss(pruned, forget) > 0.5
    assert 0.4 < record["changed_codes"] <= 0.5  # half of the weights are pruned, the others moved


def test_killed_and_resumed_gives_the_same_bytes(
    quantized: Checkpoint, tmp_path: Path, forget: Tensor, retain: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, record = unlearn(quantized, tmp_path / "straight", forget, retain)
    calls: list[int] = []
    inner = unlearning._sequence_losses

    def dying(*arguments: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 14:
            raise Killed
        return inner(*arguments)

    monkeypatch.setattr(unlearning, "_sequence_losses", dying)
    with pytest.raises(Killed):
        unlearn(quantized, tmp_path / "killed", forget, retain)
    resumed, again = unlearn(quantized, tmp_path / "killed", forget, retain)
    assert hashes(resumed.folder) == hashes(straight.folder)
    assert again == record
    assert len(calls) == 14 + 15


def test_objective_by_hand() -> None:
    options = {"forget_weight": 0.5, "retain_weight": 2.0}
    assert gradient_ascent.combine(torch.tensor(3.0), torch.tensor(1.0), options).item() == 0.5


def test_zero_points_and_their_layout_stay(
    pruned: Checkpoint, tmp_path: Path, forget: Tensor, retain: Tensor, ids: Tensor
) -> None:
    """Two widths of asymmetric grids: the file that others load is still one that they load."""
    before = quantize(pruned, tmp_path / "quantized", settings=Settings(32, symmetric=False))
    after, record = unlearn(before, tmp_path / "unlearned", forget, retain)
    assert record["changed_codes"] > 0
    here, there = all_tensors(before), all_tensors(after)
    assert {name: tensor.shape for name, tensor in here.items()} == {name: t.shape for name, t in there.items()}
    for layer, keep in all_masks(after).items():
        codes, grid = unpack(layer, there, bits(after)[layer])
        assert torch.equal(there[f"{layer}.weight_zero_point"], here[f"{layer}.weight_zero_point"])
        assert revived(grid.values(codes), keep) == 0
    torch.testing.assert_close(whole_logits(after.folder, ids), walked_logits(after.folder, ids), rtol=1e-4, atol=1e-4)
