"""Losses are those of the whole model, sizes those of the files."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from compression.core import batches
from compression.core.checkpoint import MASKS, Checkpoint, CheckpointWriter
from compression.core.errors import Problem
from compression.evaluation import loss
from compression.evaluation.loss import token_losses
from compression.evaluation.size import measure_size
from compression.evaluation.speed import measure_speed
from compression.quantization.packed import block_reader
from tests import tiny
from tests.compression.helpers import CPU, all_masks, lineage, make_skeleton, whole_model
from tests.conftest import Make
from tests.reference import evaluation as reference


@pytest.mark.parametrize("family", tiny.CAUSAL)
def test_equals_one_token_at_a_time(family: str, imported: Make, ids: Tensor) -> None:
    short = ids[:2, :24]
    losses = token_losses(make_skeleton(imported(family)), {"text": short})["text"]
    naive = reference.token_losses(whole_model(imported(family)), short)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), naive, rtol=1e-4, atol=1e-4)


def test_equals_the_whole_models_loss(imported: Make, ids: Tensor) -> None:
    model = whole_model(imported("llama")).requires_grad_(False)
    losses = token_losses(make_skeleton(imported("llama")), {"text": ids})["text"]
    assert float(losses.mean()) == pytest.approx(float(model(input_ids=ids, labels=ids).loss), abs=1e-5)
    perplexity = float(losses.double().mean().exp())
    assert 1 < perplexity < 10  # the model has learned its text: 96 would be a guess


@pytest.mark.parametrize("tokens", [1, 64, 130, 100_000])
def test_batches_do_not_matter(tokens: int, imported: Make, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {"long": ids, "short": ids[:3, :20], "one": ids[:1]}
    expected = token_losses(make_skeleton(imported("opt")), texts)
    monkeypatch.setattr(batches, "CPU_TOKENS", tokens)
    monkeypatch.setattr(loss, "HEAD_TOKENS", tokens)
    split = token_losses(make_skeleton(imported("opt")), texts)
    for name, own in texts.items():
        assert split[name].shape == (len(own), own.shape[1] - 1)
        torch.testing.assert_close(split[name], expected[name], rtol=1e-5, atol=1e-5)


def test_texts_do_not_touch_each_other(imported: Make, ids: Tensor) -> None:
    story = tiny.encode(tiny.story(4, 8))
    together = token_losses(make_skeleton(imported("llama")), {"sea": ids, "story": story})
    for name, own in (("sea", ids), ("story", story)):
        alone = token_losses(make_skeleton(imported("llama")), {name: own})[name]
        torch.testing.assert_close(together[name], alone, rtol=1e-5, atol=1e-5)


def test_size_of_a_dense_model(imported: Make) -> None:
    checkpoint = Checkpoint(imported("qwen2"))
    size = measure_size(checkpoint)
    model = whole_model(imported("qwen2"))
    assert size["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert size["prunable_parameters"] == sum(
        model.get_parameter(f"{layer}.weight").numel() for layer in checkpoint.layers
    )
    assert (size["sparsity"], size["revived_weights"], size["mask_bytes"], size["layer_sparsity"]) == (0, 0, 0, {})
    assert size["bytes"] == sum(file.stat().st_size for file in checkpoint.folder.glob("*.safetensors"))
    assert 32 < size["bits_per_weight"] < 36  # float32 and the files' heads


def test_size_of_a_pruned_model(pruned: Checkpoint) -> None:
    size = measure_size(pruned)
    dropped = {layer: 1 - float(mask.double().mean()) for layer, mask in all_masks(pruned).items()}
    assert size["layer_sparsity"] == pytest.approx(dropped)
    assert size["sparsity"] == size["zeros"] == 0.5
    assert size["mask_bytes"] == (pruned.folder / MASKS).stat().st_size
    weights = sum(f.stat().st_size for f in pruned.folder.glob("*.safetensors") if f.name != MASKS)
    assert size["bytes"] == weights


def layers_in(tensors: dict[str, Tensor]) -> list[str]:
    return [name.removesuffix(".weight") for name in tensors if name.endswith("_proj.weight")]


def test_size_of_a_quantised_model(pruned: Checkpoint, quantized: Checkpoint) -> None:
    size, before = measure_size(quantized), measure_size(pruned)
    same = ("parameters", "prunable_parameters", "sparsity", "layer_sparsity", "revived_weights")
    assert {key: size[key] for key in same} == {key: before[key] for key in same}
    plain = [block_reader(quantized)(index) for index in range(quantized.depth)]
    zeros = sum(int((tensors[f"{layer}.weight"] == 0).sum()) for tensors in plain for layer in layers_in(tensors))
    assert size["zeros"] == zeros / size["prunable_parameters"] >= size["sparsity"]
    assert size["bytes"] < 0.6 * before["bytes"]
    assert size["bits_per_weight"] == 8 * size["bytes"] / size["parameters"]


def test_size_tells_kept_zeros_from_pruned_ones(pruned: Checkpoint, tmp_path: Path) -> None:
    layer = "model.layers.0.self_attn.q_proj"
    writer = CheckpointWriter(tmp_path / "x", pruned.folder)
    writer.write_outer(pruned.outer())
    for index in range(pruned.depth):
        tensors = pruned.block(index)
        if index == 0:
            tensors[f"{layer}.weight"][:] = 0
        writer.write_block(index, tensors, pruned.block_masks(index, pruned.masks()))
    writer.finish(pruned.depth, lineage(pruned))
    size = measure_size(Checkpoint(tmp_path / "x"))
    assert size["sparsity"] == 0.5
    assert size["zeros"] == 0.5 + 0.5 * 32 * 32 / size["prunable_parameters"]


def test_revived_weight_is_found(pruned: Checkpoint, tmp_path: Path) -> None:
    """Written past the ledger, by whatever means."""
    layer = "model.layers.2.mlp.up_proj"
    writer = CheckpointWriter(tmp_path / "x", pruned.folder)
    writer.write_outer(pruned.outer())
    for index in range(pruned.depth):
        tensors, keep = pruned.block(index), pruned.block_masks(index, pruned.masks())
        writer.write_block(index, tensors, keep)
        if index == 2:
            tensors[f"{layer}.weight"][~keep[layer]] = 1.0
            writer.write_block(index, tensors)
    writer.finish(pruned.depth, lineage(pruned))
    count = int((~all_masks(pruned)[layer]).sum())
    with pytest.raises(Problem, match=rf"{count} pruned weights are not zero any more"):
        measure_size(Checkpoint(tmp_path / "x"))


@pytest.mark.parametrize("kind", ["pruned", "quantized"])
def test_speed_of_what_ships(kind: str, request: pytest.FixtureRequest) -> None:
    checkpoint: Checkpoint = request.getfixturevalue(kind)
    speed = measure_speed(checkpoint.folder, prefill=16, decode=4, repeats=2, device=CPU, dtype=torch.float32)
    assert (speed["device"], speed["dtype"], speed["kernels"]) == ("cpu", "float32", None)
    figures = ("load_seconds", "prefill_tokens_per_second", "decode_tokens_per_second", "peak_memory_bytes")
    assert all(speed[figure] > 0 for figure in figures)
    parameters = measure_size(checkpoint)["parameters"]
    assert 1 <= speed["weight_bytes"] / (4 * parameters) < 1.1  # unpacked, where it was packed, and scales are left
    assert speed["peak_memory_bytes"] > speed["weight_bytes"]


def test_speed_with_kernels_stands_beside_speed_without(quantized: Checkpoint) -> None:
    """The kernels take the first block's 32 inputs with a scale a row, and of the others what has 64 outputs."""
    speed = measure_speed(quantized.folder, prefill=16, decode=4, repeats=1, device=CPU, dtype=torch.bfloat16)
    kernels = speed["kernels"]
    assert kernels["layers"] == {"int4": 4, "int8": 6}
    taken = {layer for layer in quantized.layers if layer.endswith(("gate_proj", "up_proj"))}
    taken |= {layer for layer in quantized.layers if ".layers.0." in layer and not layer.endswith("down_proj")}
    assert set(kernels["left"]) == set(quantized.layers) - taken
    assert all(kernels[rate] > 0 for rate in ("prefill_tokens_per_second", "decode_tokens_per_second"))
    assert 0 < kernels["logits_error"] < 0.03
    numbers = {layer: outputs * inputs for layer, (outputs, inputs) in quantized.layers.items() if layer in taken}
    saved = sum((1 if ".layers.0." in layer else 1.5) * count for layer, count in numbers.items())
    assert 0.9 * saved < speed["weight_bytes"] - kernels["weight_bytes"] < 1.1 * saved  # scales are stored otherwise
