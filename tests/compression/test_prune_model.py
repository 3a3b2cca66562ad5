"""Pruning a model on disk: one pass, any batch split, every family, and a kill anywhere costs no bytes."""

from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from compression.core import batches
from compression.core.checkpoint import Checkpoint, CheckpointWriter
from compression.core.errors import Problem
from compression.core.files import sha256, write_tensors
from compression.importing import import_model
from compression.pruning import METHODS, run, sparsegpt, wanda
from compression.pruning.method import Settings
from compression.pruning.pattern import NofM, Pattern, Unstructured
from tests import tiny
from tests.compression.helpers import (
    CPU,
    Killed,
    all_masks,
    all_tensors,
    hashes,
    journal,
    lineage,
    prune,
    walked_logits,
    whole_logits,
    whole_model,
)
from tests.conftest import Make
from tests.reference import obs
from tests.reference import pruning as reference

HALF = Unstructured(0.5)
NAMES = [name for name, module in METHODS.items() if hasattr(import_module(module), "prune")]
every_method = pytest.mark.parametrize("method", NAMES)
GRAM = [name for name in NAMES if name not in ("magnitude", "wanda")]  # these change what stays, too
# Every family for the quick methods; for the others one of each kind of block, and llama for all.
CASES = [
    *((method, family) for method in ("magnitude", "wanda") for family in tiny.FAMILIES),
    *((method, family) for method in ("sparsegpt", "alps") for family in ("opt", "gpt_neox", "bert")),
    *((method, "llama") for method in GRAM),
]


def half(method: str) -> Unstructured:
    """50 %, among the weights that the method usually compares."""
    return Unstructured(0.5, import_module(METHODS[method]).SCOPES[0])


def prune_noting(
    source: Path, target: Path, method: Any, pattern: Pattern, ids: Tensor
) -> tuple[Checkpoint, run.Ledger]:
    """As helpers.prune, with what the method noted, which goes into the manifest as the stage has it."""
    checkpoint, writer = Checkpoint(source), CheckpointWriter(target, source)
    patterns = dict.fromkeys(checkpoint.layers, pattern)
    ledger = run.prune_model(
        checkpoint, writer, journal(target), method, patterns, Settings(columns=10), ids, CPU, torch.float32
    )
    writer.finish(checkpoint.depth, lineage(checkpoint) | {"pruning": ledger})
    return Checkpoint(target), ledger


def manifest(checkpoint: Checkpoint) -> bytes:
    return (checkpoint.folder / "manifest.json").read_bytes()


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Share of the mask bits in which two models differ."""
    assert one.keys() == other.keys()
    return sum(int((one[name] != other[name]).sum()) for name in one) / sum(mask.numel() for mask in one.values())


def layers_of(checkpoint: Checkpoint, passes: int) -> list[list[str]]:
    """One pass: each layer is pruned behind the one before it. Two: all of a block together."""
    if passes == 1:
        return [[layer] for layer in checkpoint.layers]
    prefixes = [f"{checkpoint.blocks}.{index}." for index in range(checkpoint.depth)]
    return [[layer for layer in checkpoint.layers if layer.startswith(prefix)] for prefix in prefixes]


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox", "bert"])
def test_equals_pruning_layer_by_layer(
    family: str, passes: int, original: Make, imported: Make, tmp_path: Path, ids: Tensor
) -> None:
    ours = all_masks(prune(imported(family), tmp_path / "pruned", wanda, HALF, ids, passes=passes))
    checkpoint = Checkpoint(imported(family))
    found = {
        way: reference.prune_model(whole_model(original(family)), layers_of(checkpoint, way), ids, HALF)
        for way in (1, 2)
    }
    assert differing(ours, found[passes]) < 1e-3  # two scores may come so close that rounding decides
    assert differing(ours, found[3 - passes]) > 2e-3  # the figure above says something


@pytest.mark.parametrize("passes", [1, 2])
def test_sparsegpt_equals_pruning_layer_by_layer(
    passes: int, original: Make, imported: Make, tmp_path: Path, ids: Tensor
) -> None:
    """Against the float64 twin in a model that is run as a whole, once a layer."""
    pruned = prune(imported("llama"), tmp_path / "pruned", sparsegpt, half("sparsegpt"), ids, passes=passes)
    model = whole_model(original("llama"))
    naive = reference.prune_model(model, layers_of(pruned, passes), ids, half("sparsegpt"), obs.sweep)
    assert differing(all_masks(pruned), naive) < 2e-3
    assert relative_gap(whole_logits(pruned.folder, ids), model(input_ids=ids).logits.detach()) < 0.02
    masked = prune(imported("llama"), tmp_path / "masked", wanda, HALF, ids)
    assert relative_gap(whole_logits(masked.folder, ids), model(input_ids=ids).logits.detach()) > 0.1


def relative_gap(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize(("method", "family"), CASES)
def test_every_family(family: str, method: str, imported: Make, tmp_path: Path, ids: Tensor) -> None:
    module = import_module(METHODS[method])
    pruned, ledger = prune_noting(imported(family), tmp_path / "pruned", module, half(method), ids)
    dense, sparse = all_tensors(Checkpoint(imported(family))), all_tensors(pruned)
    keep = all_masks(pruned)
    assert set(keep) == set(ledger) == set(pruned.layers)
    assert len(keep) >= 4 * pruned.depth
    assert sparse.keys() == dense.keys()
    for name, tensor in dense.items():
        layer = name.removesuffix(".weight")
        mask = keep.get(layer)
        if mask is None:
            assert torch.equal(sparse[name], tensor)
            continue
        assert int(mask.sum()) * 2 == mask.numel()
        if method in GRAM:
            assert torch.equal(sparse[name] != 0, mask)
            assert not torch.equal(sparse[name], tensor * mask)
            assert 0 < ledger[layer]["error"] < 0.5
        else:
            assert torch.equal(sparse[name], tensor * mask)
            assert ledger[layer] == {}
    torch.testing.assert_close(
        walked_logits(pruned.folder, ids), whole_logits(pruned.folder, ids), rtol=1e-5, atol=1e-5
    )


def test_weights_keep_their_stored_type(original: Make, tmp_path: Path, ids: Tensor) -> None:
    """Forward in bfloat16, weights in float32, and the other way round."""
    for stored, computed in (("float32", torch.bfloat16), ("bfloat16", torch.float32)):
        import_model(original("llama"), tmp_path / stored, stored, {})
        pruned = prune(tmp_path / stored, tmp_path / f"{stored}-pruned", wanda, HALF, ids, computed)
        dense = all_tensors(Checkpoint(tmp_path / stored))
        for layer, mask in all_masks(pruned).items():
            weight = all_tensors(pruned)[f"{layer}.weight"]
            assert weight.dtype == getattr(torch, stored)
            assert torch.equal(weight, dense[f"{layer}.weight"] * mask)


@pytest.mark.parametrize("method", [name for name in NAMES if name != "magnitude"])
def test_batch_split_does_not_matter(
    method: str, imported: Make, tmp_path: Path, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = import_module(METHODS[method])
    whole, noted = prune_noting(imported("llama"), tmp_path / "whole", module, half(method), ids)
    for tokens in (1, 128, 256):
        monkeypatch.setattr(batches, "CPU_TOKENS", tokens)
        split, again = prune_noting(imported("llama"), tmp_path / f"split-{tokens}", module, half(method), ids)
        assert differing(all_masks(split), all_masks(whole)) < 1e-3
        for layer, notes in noted.items():
            for name, value in notes.items():
                assert again[layer][name] == pytest.approx(value, rel=0.3 if name == "steps" else 0.01)


def test_uneven_last_batch(imported: Make, tmp_path: Path, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = prune(imported("llama"), tmp_path / "whole", wanda, HALF, ids[:5])
    monkeypatch.setattr(batches, "CPU_TOKENS", 2 * ids.shape[1])
    split = prune(imported("llama"), tmp_path / "split", wanda, HALF, ids[:5])
    assert differing(all_masks(split), all_masks(whole)) < 1e-3


@every_method
def test_same_run_same_bytes(method: str, imported: Make, tmp_path: Path, ids: Tensor) -> None:
    module = import_module(METHODS[method])
    first, noted = prune_noting(imported("llama"), tmp_path / "first", module, half(method), ids)
    again, noted_again = prune_noting(imported("llama"), tmp_path / "again", module, half(method), ids)
    assert hashes(again.folder) == hashes(first.folder)
    assert noted_again == noted
    assert manifest(again) == manifest(first)


@pytest.mark.parametrize("method", GRAM)
def test_layers_with_one_input_share_its_sums(method: str, imported: Make, tmp_path: Path, ids: Tensor) -> None:
    """X^T X is summed up and factored once for q, k and v, and once for gate and up."""
    module = import_module(METHODS[method])
    seen: dict[int, Any] = {}

    def watched(weight: Tensor, statistic: Any, *arguments: Any) -> Any:
        seen[id(statistic)] = statistic
        return module.prune(weight, statistic, *arguments)

    watching = SimpleNamespace(STATISTIC=module.STATISTIC, prune=watched)
    prune_noting(imported("llama"), tmp_path / "pruned", watching, half(method), ids)
    assert len(seen) == 3 * 4  # blocks; inputs of q k v, of o, of gate and up, of down
    assert {statistic.tokens for statistic in seen.values()} == {ids.numel()}


def spy(method: Any, pruned: list[int]) -> Any:
    """The method, noting each call."""

    def watched(*arguments: Any) -> Any:
        pruned.append(1)
        return method.prune(*arguments)

    return SimpleNamespace(STATISTIC=method.STATISTIC, prune=watched)


@every_method
@pytest.mark.parametrize("after", ["nothing of the block", "the block's file", "one layer"])
def test_killed_and_resumed_gives_the_same_bytes(
    method: str, after: str, imported: Make, tmp_path: Path, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = import_module(METHODS[method])
    straight, noted = prune_noting(imported("opt"), tmp_path / "straight", module, half(method), ids)
    calls: list[int] = []
    write = CheckpointWriter.write_block

    def dying_write(self: CheckpointWriter, index: int, *arguments: Any) -> None:
        if index != 2 or after == "the block's file":
            write(self, index, *arguments)
        if index == 2:
            raise Killed

    def dying_method(*arguments: Any) -> Any:
        if len(calls) == 2 * 6 + 1:
            raise Killed
        calls.append(1)
        return module.prune(*arguments)

    target = tmp_path / "resumed"
    with monkeypatch.context() as patch:
        dying = module
        if after == "one layer":
            dying = SimpleNamespace(STATISTIC=module.STATISTIC, prune=dying_method)  # type: ignore[assignment]
        else:
            patch.setattr(CheckpointWriter, "write_block", dying_write)
        with pytest.raises(Killed):
            prune_noting(imported("opt"), target, dying, half(method), ids)
    assert not (target / "manifest.json").exists()

    recomputed: list[int] = []
    resumed, noted_again = prune_noting(imported("opt"), target, spy(module, recomputed), half(method), ids)
    assert hashes(resumed.folder) == hashes(straight.folder)
    assert noted_again == noted
    assert manifest(resumed) == manifest(straight)
    assert len(recomputed) == 6  # one block of OPT: two of three were finished


def broken(source: Path, target: Path, layer: str, value: float) -> Path:
    """A copy of a checkpoint with one weight replaced."""
    checkpoint = Checkpoint(source)
    writer = CheckpointWriter(target, source)
    writer.write_outer(checkpoint.outer())
    for index in range(checkpoint.depth):
        tensors = checkpoint.block(index)
        if f"{layer}.weight" in tensors:
            tensors[f"{layer}.weight"][0, 0] = value
        writer.write_block(index, tensors)
    writer.finish(checkpoint.depth, lineage(checkpoint))
    return target


@every_method
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_are_named(method: str, value: float, imported: Make, tmp_path: Path, ids: Tensor) -> None:
    source = broken(imported("llama"), tmp_path / "broken", "model.layers.1.mlp.up_proj", value)
    with pytest.raises(Problem, match=r"model\.layers\.1\.mlp\.up_proj\.weight: holds NaN or infinite"):
        prune(source, tmp_path / "pruned", import_module(METHODS[method]), HALF, ids)


def test_broken_inputs_are_named(imported: Make, tmp_path: Path, ids: Tensor) -> None:
    """An infinite norm scale is no prunable weight, but what comes after it is not sound."""
    checkpoint = Checkpoint(imported("llama"))
    writer = CheckpointWriter(tmp_path / "broken", checkpoint.folder)
    writer.write_outer(checkpoint.outer())
    for index in range(checkpoint.depth):
        tensors = checkpoint.block(index)
        if index == 1:
            tensors["model.layers.1.input_layernorm.weight"][3] = float("inf")
        writer.write_block(index, tensors)
    writer.finish(checkpoint.depth, lineage(checkpoint))
    with pytest.raises(Problem, match=r"model\.layers\.1\.self_attn\.q_proj: its inputs hold NaN or infinite"):
        prune(tmp_path / "broken", tmp_path / "pruned", wanda, HALF, ids)


@every_method
def test_pattern_that_does_not_divide_is_refused_before_work(
    method: str, imported: Make, tmp_path: Path, ids: Tensor
) -> None:
    with pytest.raises(Problem, match=r"model\.layers\.0\.self_attn\.q_proj: 32 inputs .* groups of 5 \(2:5\)"):
        prune(imported("llama"), tmp_path / "pruned", import_module(METHODS[method]), NofM(2, 5), ids)
    assert not list((tmp_path / "pruned").glob("*.safetensors"))


def test_journal_of_a_finished_run_does_nothing_again(imported: Make, tmp_path: Path, ids: Tensor) -> None:
    """Killed between the last block and the manifest."""
    straight = prune(imported("opt"), tmp_path / "straight", wanda, HALF, ids)
    source, target = Checkpoint(imported("opt")), tmp_path / "resumed"
    writer = CheckpointWriter(target, source.folder)
    run.prune_model(
        source, writer, journal(target), wanda, dict.fromkeys(source.layers, HALF), Settings(), ids, CPU, torch.float32
    )
    calls: list[int] = []
    resumed = prune(imported("opt"), target, spy(wanda, calls), HALF, ids)
    assert calls == []
    assert hashes(resumed.folder) == hashes(straight.folder)


def test_damaged_source_is_noticed_while_pruning(imported: Make, tmp_path: Path, ids: Tensor) -> None:
    source = Checkpoint(imported("llama"))
    copy = broken(imported("llama"), tmp_path / "copy", "model.layers.2.mlp.up_proj", 1.0)
    write_tensors(copy / "block-00002.safetensors", source.block(2))
    assert sha256(copy / "block-00002.safetensors") != hashes(copy)["block-00002.safetensors"]
    with pytest.raises(Problem, match=r"block-00002\.safetensors: the file is not the one its manifest names"):
        prune(copy, tmp_path / "pruned", wanda, HALF, ids)
