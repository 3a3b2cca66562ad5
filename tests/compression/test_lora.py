"""Plain LoRA: the adapter learns, the sparse weights beside it stay, and peft reads what was written."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from compression.core.adapter import ADAPTER_CONFIG, ADAPTER_TENSORS, read_adapter
from compression.core.checkpoint import Checkpoint, CheckpointWriter
from compression.core.errors import Problem
from compression.core.files import read_tensors
from compression.evaluation.loss import token_losses
from compression.evaluation.size import measure_size
from compression.pruning import magnitude
from compression.pruning.pattern import Unstructured
from compression.quantization.packed import base_reader, block_reader
from compression.retraining import lora
from compression.retraining.parameters import Merge
from compression.training.loop import Recipe, train
from compression.training.text import Shuffled, next_token_loss
from compression.training.whole import load_whole, read_whole, write_whole
from tasks.core.passing import pass_through
from tests import tiny
from tests.compression.helpers import (
    CPU,
    Killed,
    all_masks,
    all_tensors,
    hashes,
    journal,
    lineage,
    make_skeleton,
    prune,
    quantize,
    walked_logits,
    whole_model,
)
from tests.conftest import Make

OPTIONS: dict[str, Any] = {
    "rank": 4,
    "alpha": 8.0,
    "dropout": 0.05,
    "targets": ["*.q_proj", "*.v_proj"],
    "biases": True,
    "norms": False,
    "head": False,
    "embeddings": False,
    "seed": 3,
}
FAMILIES = ["llama", "opt", "qwen2"]  # without biases; with; with a tied head

Mended = Callable[[str], tuple[Checkpoint, Checkpoint, list[float]]]


@pytest.fixture(scope="module")
def text() -> Tensor:
    return tiny.encode(tiny.sentences(1, 120))


@pytest.fixture(scope="module")
def mended(tmp_path_factory: pytest.TempPathFactory, imported: Make, text: Tensor, ids: Tensor) -> Mended:
    """family -> pruned hard by magnitude; the same with an adapter; losses by step. Not to be changed."""

    @cache
    def make(family: str) -> tuple[Checkpoint, Checkpoint, list[float]]:
        folder = tmp_path_factory.mktemp("lora") / family
        bare = prune(imported(family), folder / "pruned", magnitude, Unstructured(0.7), ids)
        return bare, *learn(bare, folder / "mended", text)

    return make


def start(source: Checkpoint, dtype: torch.dtype, **options: Any) -> tuple[nn.Module, dict[str, nn.Parameter], Merge]:
    tensors, keep = read_whole(source, "load")
    model = load_whole(source.folder, tensors, CPU, dtype)
    return model, *lora.attach(model, keep, OPTIONS | options)


def learn(
    source: Checkpoint,
    target: Path,
    text: Tensor,
    steps: int = 25,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> tuple[Checkpoint, list[float]]:
    """Trains an adapter and writes it beside the weights."""
    model, parameters, merge = start(source, dtype, **options)
    tensors, keep = read_whole(source, "load")
    draw = Shuffled(text, 4, 0)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        value = next_token_loss(model, draw(step))
        return value, {"loss": value.item()}

    curves, _ = train(parameters, loss, Recipe(steps, 1e-2, 0.1, 1.0), journal(target), "retrain", 256)
    assert merge(tensors) == {}
    changed = {name: parameter.to(tensors[name].dtype) for name, parameter in parameters.items() if name in tensors}
    writer = CheckpointWriter(target, source.folder)
    write_whole(source, writer, tensors | changed, keep, {})
    lora.save(target, parameters, OPTIONS | options)
    writer.finish(source.depth, lineage(source))
    return Checkpoint(target), curves["loss"]


def loss_on(checkpoint: Checkpoint, ids: Tensor) -> float:
    return float(token_losses(make_skeleton(checkpoint.folder), {"text": ids})["text"].mean())


def with_peft(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Base and adapter as anyone loads them."""
    model: nn.Module = PeftModel.from_pretrained(whole_model(checkpoint.folder, dtype), checkpoint.folder / "adapter")
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_falls_and_the_base_stays(family: str, mended: Mended, ids: Tensor) -> None:
    bare, adapted, losses = mended(family)
    assert sum(losses[-5:]) / 5 < losses[0] - 0.1
    assert loss_on(adapted, ids) < loss_on(bare, ids) - 0.1  # on text that it was not trained on, from disk
    before, after = all_tensors(bare), all_tensors(adapted)
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    biases = {name for name in before if name.endswith(".bias")}
    # A key's bias shifts all scores of a query alike: it has no gradient but noise.
    assert moved <= biases
    assert biases - moved <= {name for name in biases if name.endswith("k_proj.bias")}
    assert bool(biases) == (family != "llama")
    assert {layer: mask.tolist() for layer, mask in all_masks(adapted).items()} == {
        layer: mask.tolist() for layer, mask in all_masks(bare).items()
    }


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_peft_loads_the_very_same_model(family: str, mended: Mended, ids: Tensor) -> None:
    _, adapted, _ = mended(family)
    expected = with_peft(adapted)(input_ids=ids).logits
    torch.testing.assert_close(walked_logits(adapted.folder, ids), expected, rtol=1e-4, atol=1e-4)
    assert (whole_model(adapted.folder)(input_ids=ids).logits - expected).abs().max() > 0.1  # without the adapter


def test_in_bfloat16_the_sum_is_rounded_and_nothing_worse(mended: Mended, ids: Tensor) -> None:
    _, adapted, _ = mended("llama")
    with torch.no_grad():
        logits = with_peft(adapted, torch.bfloat16)(input_ids=ids).logits.float()
    beside = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    summed = token_losses(make_skeleton(adapted.folder, torch.bfloat16), {"text": ids})["text"].mean()
    assert float(summed) == pytest.approx(float(beside), abs=0.01)


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_have_the_names_of_the_checkpoint(family: str, mended: Mended) -> None:
    bare, _, _ = mended(family)
    _, parameters, _ = start(bare, torch.bfloat16, norms=True, embeddings=True)
    stored = all_tensors(bare)
    adapters = {name for name in parameters if name.endswith((".lora_A", ".lora_B"))}
    layers = {layer for layer in bare.layers if layer.endswith(("q_proj", "v_proj"))}
    assert adapters == {f"{layer}.lora_{part}" for layer in layers for part in "AB"}
    freed = {name for name, tensor in stored.items() if tensor.ndim == 1 or "embed_tokens" in name}
    assert parameters.keys() - adapters == freed
    for layer in layers:
        rows, width = bare.layers[layer]
        A, B = parameters[f"{layer}.lora_A"], parameters[f"{layer}.lora_B"]
        assert (A.shape, B.shape) == ((4, width), (rows, 4))
        assert 0.9 / width**0.5 < A.abs().max() <= 1 / width**0.5
        assert (B == 0).all()
    assert all(parameter.requires_grad and parameter.dtype == torch.bfloat16 for parameter in parameters.values())


def test_nothing_else_learns(mended: Mended, text: Tensor) -> None:
    model, parameters, _ = start(mended("opt")[0], torch.float32)
    next_token_loss(model, text[:2]).backward()
    learning = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert learning == {id(parameter) for parameter in parameters.values()}
    assert all(parameter.grad is not None for parameter in parameters.values())


def test_seed_decides_about_the_bytes(mended: Mended, tmp_path: Path, text: Tensor) -> None:
    bare, _, _ = mended("opt")
    one, _ = learn(bare, tmp_path / "one", text, 3)
    torch.manual_seed(17)
    same, _ = learn(bare, tmp_path / "same", text, 3)
    other, _ = learn(bare, tmp_path / "other", text, 3, seed=4)
    assert hashes(one.folder) == hashes(same.folder)
    assert hashes(one.folder)[ADAPTER_TENSORS] != hashes(other.folder)[ADAPTER_TENSORS]
    assert hashes(one.folder)[ADAPTER_CONFIG] == hashes(other.folder)[ADAPTER_CONFIG]


def test_global_generator_is_left_alone(mended: Mended, text: Tensor) -> None:
    before = torch.get_rng_state()
    model, _, _ = start(mended("llama")[0], torch.float32)
    next_token_loss(model, text[:2]).backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_config_is_the_same_in_every_process(mended: Mended) -> None:
    _, adapted, _ = mended("llama")
    written = (adapted.folder / ADAPTER_CONFIG).read_text()
    config = json.loads(written)
    assert str(adapted.folder.parent) not in written
    assert config["base_model_name_or_path"] is None
    assert config["target_modules"] == sorted(config["target_modules"])
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 8.0, 0.05)
    assert list(config) == sorted(config)


def test_dropout_is_on_in_training_only(mended: Mended, text: Tensor) -> None:
    bare, _, _ = mended("llama")
    losses = {}
    for dropout in (0.0, 0.5):
        model, parameters, _ = start(bare, torch.float32, dropout=dropout)
        for name, parameter in parameters.items():
            if name.endswith(".lora_B"):
                nn.init.constant_(parameter, 0.5)  # B starts at zero: nothing would be seen of what A is given
        with torch.no_grad():
            still = next_token_loss(model, text[:2]).item()
        losses[dropout] = (still, *(next_token_loss(model, text[:2]).item() for _ in range(2)))
    assert losses[0.0] == (losses[0.0][0],) * 3
    still, learning, again = losses[0.5]
    assert still == losses[0.0][0]
    assert abs(learning - still) > 1e-3
    assert learning == again


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dropout_drops_the_share_and_keeps_the_mean(dtype: torch.dtype) -> None:
    x = torch.rand(4, 64, 128, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_(True)
    dropped = lora.Dropout(0.25, 1)(x)
    gone = dropped == 0
    assert gone.float().mean().item() == pytest.approx(0.25, abs=0.01)
    torch.testing.assert_close(dropped[~gone], x[~gone] / 0.75)
    dropped.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad == 0, gone)
    assert torch.equal(lora.Dropout(0.25, 1)(x), dropped)
    assert not torch.equal(lora.Dropout(0.25, 2)(x) == 0, gone)  # another layer
    assert not torch.equal(lora.Dropout(0.25, 1)(x + 1) == 0, gone)  # another batch


def test_no_dropout_costs_nothing(mended: Mended) -> None:
    model, _, _ = start(mended("llama")[0], torch.float32, dropout=0.0)
    slots = [module.lora_dropout["default"] for module in model.modules() if hasattr(module, "lora_dropout")]
    assert slots
    assert all(isinstance(slot, nn.Identity) for slot in slots)


def test_killed_and_resumed_gives_the_same_bytes(
    mended: Mended, tmp_path: Path, text: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare, straight, losses = mended("opt")
    calls: list[int] = []
    monkeypatch.setitem(globals(), "next_token_loss", _dying(calls))
    with pytest.raises(Killed):
        learn(bare, tmp_path / "killed", text)
    torch.manual_seed(17)
    resumed, again = learn(bare, tmp_path / "killed", text)
    assert len(calls) == 17 + 15  # it went on at step 10
    assert hashes(resumed.folder) == hashes(straight.folder)
    assert again == losses


def _dying(calls: list[int]) -> Callable[..., Tensor]:
    inner = next_token_loss

    def dying(*arguments: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 17:
            raise Killed
        return inner(*arguments)

    return dying


def test_targets_choose_layers(mended: Mended) -> None:
    bare, adapted, _ = mended("llama")
    adapter = read_adapter(adapted)
    assert adapter is not None
    assert set(adapter.layers) == {layer for layer in bare.layers if layer.endswith(("q_proj", "v_proj"))}
    assert adapter.scaling == 2.0
    for targets, count in (([], 21), (["*"], 21), (["*.layers.1.*"], 7), (["model.layers.2.mlp.up_proj", "*.0.*"], 8)):
        _, parameters, _ = start(bare, torch.float32, targets=targets)
        assert len([name for name in parameters if name.endswith(".lora_A")]) == count


def test_all_layers_are_saved_and_loaded(mended: Mended, tmp_path: Path, text: Tensor, ids: Tensor) -> None:
    adapted, _ = learn(mended("llama")[0], tmp_path / "all", text, 2, torch.bfloat16, targets=[], dropout=0.0)
    tensors = read_tensors(adapted.folder / ADAPTER_TENSORS)
    assert len(tensors) == 42
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    with torch.no_grad():
        expected = with_peft(adapted)(input_ids=ids).logits
    torch.testing.assert_close(walked_logits(adapted.folder, ids), expected, rtol=1e-4, atol=1e-4)


def test_target_without_a_layer_is_said(mended: Mended) -> None:
    with pytest.raises(Problem, match=r"retrain\.targets: .*`\*\.query`.*\n.*q_proj"):
        start(mended("llama")[0], torch.float32, targets=["*.q_proj", "*.query"])


@pytest.mark.parametrize("name", [ADAPTER_CONFIG, ADAPTER_TENSORS])
def test_a_damaged_adapter_is_noticed(name: str, mended: Mended, tmp_path: Path) -> None:
    pass_through(mended("llama")[1], tmp_path / "copy", {})
    file = tmp_path / "copy" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.unlink()  # a hard link
    with pytest.raises(Problem, match=f"{name}: the file is missing"):
        block_reader(Checkpoint(tmp_path / "copy"))
    file.write_bytes(content)
    with pytest.raises(Problem, match=f"{name}: the file is not the one its manifest names"):
        block_reader(Checkpoint(tmp_path / "copy"))


def test_passing_through_keeps_the_adapter(mended: Mended, tmp_path: Path, ids: Tensor) -> None:
    _, adapted, _ = mended("opt")
    pass_through(adapted, tmp_path / "next", {})
    assert hashes(tmp_path / "next") == hashes(adapted.folder)
    assert {ADAPTER_CONFIG, ADAPTER_TENSORS} <= hashes(adapted.folder).keys()
    assert torch.equal(walked_logits(tmp_path / "next", ids), walked_logits(adapted.folder, ids))


def test_other_weights_do_not_inherit_the_adapter(mended: Mended, tmp_path: Path) -> None:
    _, adapted, _ = mended("llama")
    packed = quantize(adapted, tmp_path / "packed")
    assert read_adapter(packed) is None
    assert not (packed.folder / "adapter").exists()


def test_adapter_on_packed_weights(mended: Mended, tmp_path: Path, ids: Tensor) -> None:
    """Whoever wants it there links it: the sum is then of the grid's values and the adapter."""
    _, adapted, _ = mended("llama")
    packed = quantize(adapted, tmp_path / "packed")
    config, writer = packed.config(), CheckpointWriter(packed.folder, adapted.folder)
    writer.link_adapter(adapted)
    writer.finish(packed.depth, lineage(packed), config)
    both = Checkpoint(packed.folder)
    adapter, plain, summed = read_adapter(both), base_reader(both)(1), block_reader(both)(1)
    assert adapter is not None
    for name in plain:
        if (layer := name.removesuffix(".weight")) in adapter.layers:
            A, B = adapter.layers[layer]
            torch.testing.assert_close(summed[name], plain[name].float() + 2 * (B @ A))
        else:
            assert torch.equal(summed[name], plain[name])
    assert loss_on(both, ids) < loss_on(mended("llama")[0], ids)


def test_size_is_that_of_the_sparse_base_and_the_adapters_bytes(mended: Mended) -> None:
    bare, adapted, _ = mended("llama")
    before, after = measure_size(bare), measure_size(adapted)
    added = (adapted.folder / ADAPTER_TENSORS).stat().st_size
    assert after["bytes"] == before["bytes"] + added
    same = before.keys() - {"bytes", "bits_per_weight"}
    assert {key: after[key] for key in same} == {key: before[key] for key in same}


def test_no_layer_no_adapter(imported: Make, tmp_path: Path, text: Tensor) -> None:
    """A dense model has no pruned layers: its norms learn, and nothing lies beside it."""
    adapted, _ = learn(Checkpoint(imported("llama")), tmp_path / "dense", text, 2, norms=True, targets=[])
    assert read_adapter(adapted) is None
    assert not (adapted.folder / "adapter").exists()
