"""Scales that are tuned after rounding: nearer to the dense model on disk, with codes, mask and bytes as they were."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compression.core.checkpoint import Checkpoint, CheckpointWriter
from compression.core.errors import Problem
from compression.core.masks import revived
from compression.quantization import gptq, tune
from compression.quantization.method import Settings
from compression.quantization.packed import unpack
from compression.quantization.scheme import anatomy
from compression.training.loop import Recipe
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
from tests.compression.test_quantize_model import run as quantize_with
from tests.conftest import Make

RECIPE = Recipe(steps=20, learning_rate=5e-3, warmup=0.1, clip=1.0)


@pytest.fixture(scope="module")
def text() -> Tensor:
    """Training text int64 [12, 64], whose last four rows are held out."""
    return tiny.encode(tiny.sentences(5, 24))[:12]


@pytest.fixture(scope="module")
def coarse(tmp_path_factory: pytest.TempPathFactory, pruned: Checkpoint) -> Checkpoint:
    """The pruned llama on 3 bits. Not to be changed."""
    return quantize(pruned, tmp_path_factory.mktemp("coarse") / "llama", bits=3)


def tuned(
    source: Checkpoint,
    dense: Path,
    target: Path,
    text: Tensor,
    recipe: Recipe = RECIPE,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> tuple[Checkpoint, dict[str, Any]]:
    writer = CheckpointWriter(target, source.folder)
    told = {"distillation": 1.0, "held_out": 4, "check_every": 5, "seed": 0} | options
    record = tune.tune_model(
        source, Checkpoint(dense), writer, journal(target), recipe, text, 2, **told, device=CPU, dtype=dtype
    )
    writer.finish(source.depth, lineage(source), source.config())
    return Checkpoint(target), record


def divergence(dense: Path, folder: Path, ids: Tensor) -> float:
    """Mean KL(dense || model) in nats over the predicted tokens, as others compute it."""
    p, q = (whole_logits(one, ids)[:, :-1].double().log_softmax(2) for one in (dense, folder))
    return float((p.exp() * (p - q)).sum(2).mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero points"])
def test_comes_nearer_to_the_dense_model_with_codes_and_mask_kept(
    symmetric: bool, dtype: torch.dtype, pruned: Checkpoint, imported: Make, tmp_path: Path, text: Tensor
) -> None:
    dense = imported("llama")
    source = quantize(pruned, tmp_path / "rounded", settings=Settings(32, symmetric), first=3)
    after, record = tuned(source, dense, tmp_path / "tuned", text, dtype=dtype)
    was, now = (divergence(dense, each.folder, text[-4:]) for each in (source, after))
    assert now < 0.85 * was
    slack = 1e-4 if dtype == torch.float32 else 0.1 * was
    assert record["held_out"][0] == pytest.approx(was, abs=slack)
    assert min(record["held_out"]) == pytest.approx(now, abs=slack)
    here, there, keep = all_tensors(source), all_tensors(after), all_masks(after)
    moved = total = 0
    for layer in source.layers:
        width = source.manifest["quantization"]["bits"][layer]
        (old, before), (new, grid) = unpack(layer, here, width), unpack(layer, there, width)
        assert torch.equal(old, new)
        assert revived(grid.values(new), keep[layer]) == 0
        moved, total = moved + int((before.scale != grid.scale).sum()), total + grid.scale.numel()
    assert record["changed_scales"] == moved / total > 0.5
    assert {name: (t.shape, t.dtype) for name, t in here.items()} == {n: (t.shape, t.dtype) for n, t in there.items()}
    assert torch.equal(here["model.embed_tokens.weight"], there["model.embed_tokens.weight"])
    torch.testing.assert_close(
        whole_logits(after.folder, text), walked_logits(after.folder, text), rtol=1e-4, atol=1e-4
    )


def test_a_rounded_embedding_stays_as_it_is(pruned: Checkpoint, imported: Make, tmp_path: Path, text: Tensor) -> None:
    embedding = anatomy(pruned.folder).embedding
    bits = {embedding: 4} | dict.fromkeys(pruned.layers, 4)
    source = quantize_with(pruned, tmp_path / "rounded", bits, text[:4], Settings(32))
    after, record = tuned(source, imported("llama"), tmp_path / "tuned", text)
    assert min(record["held_out"]) < record["held_out"][0]
    here, there = source.outer(), after.outer()
    own = [name for name in here if name.startswith(embedding)]
    assert own
    assert all(torch.equal(here[name], there[name]) for name in own)
    torch.testing.assert_close(
        whole_logits(after.folder, text), walked_logits(after.folder, text), rtol=1e-4, atol=1e-4
    )


def test_what_makes_it_worse_is_not_kept(coarse: Checkpoint, imported: Make, tmp_path: Path, text: Tensor) -> None:
    wild = Recipe(steps=5, learning_rate=1.0, warmup=0.0, clip=100.0)
    after, record = tuned(coarse, imported("llama"), tmp_path / "tuned", text, wild)
    assert min(record["held_out"][1:]) > record["held_out"][0]
    assert record["changed_scales"] == 0
    here, there = all_tensors(coarse), all_tensors(after)
    assert all(torch.equal(tensor, there[name]) for name, tensor in here.items())


def test_held_out_text_is_not_trained_on(coarse: Checkpoint, imported: Make, tmp_path: Path, text: Tensor) -> None:
    """Other rows held out make another model only where looks decide; here the last step's values are kept."""
    other = torch.cat([text[:8], text[:4]])
    one, two = (
        tuned(coarse, imported("llama"), tmp_path / name, rows, held_out=4, check_every=20)
        for name, rows in (("one", text), ("two", other))
    )
    assert one[1]["losses"] == two[1]["losses"]
    assert one[1]["held_out"] != two[1]["held_out"]


def test_killed_and_resumed_gives_the_same_bytes(
    coarse: Checkpoint, imported: Make, tmp_path: Path, text: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, record = tuned(coarse, imported("llama"), tmp_path / "straight", text, held_out=0)
    inner, calls = tune.distillation_loss, []

    def dying(*arguments: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 14:
            raise Killed
        return inner(*arguments)

    monkeypatch.setattr(tune, "distillation_loss", dying)
    with pytest.raises(Killed):
        tuned(coarse, imported("llama"), tmp_path / "killed", text, held_out=0)
    resumed, again = tuned(coarse, imported("llama"), tmp_path / "killed", text, held_out=0)
    assert hashes(resumed.folder) == hashes(straight.folder)
    assert again == record
    assert record["held_out"] == []
    assert len(calls) == 14 + 10  # the journal had the first ten steps


def test_a_model_without_a_grid_is_refused(pruned: Checkpoint, imported: Make, tmp_path: Path, text: Tensor) -> None:
    with pytest.raises(Problem, match=r"no layer is quantised, so there are no scales to train"):
        tuned(pruned, imported("llama"), tmp_path / "x", text)


def test_gptq_is_tuned_too(pruned: Checkpoint, imported: Make, tmp_path: Path, text: Tensor, ids: Tensor) -> None:
    source = quantize(pruned, tmp_path / "rounded", method=gptq, ids=ids, bits=3)
    after, _ = tuned(source, imported("llama"), tmp_path / "tuned", text)
    dense = imported("llama")
    assert divergence(dense, after.folder, text[-4:]) < divergence(dense, source.folder, text[-4:])
