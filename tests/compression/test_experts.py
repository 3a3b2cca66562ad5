"""Experts are layers like any other: scored by the tokens that are sent to them, and named where none was."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compression.core import batches
from compression.core.checkpoint import Checkpoint
from compression.core.errors import Problem
from compression.pruning import sparsegpt, wanda
from compression.pruning.pattern import NofM, Unstructured
from tests import tiny
from tests.compression.helpers import (
    all_masks,
    all_tensors,
    prune,
    quantize,
    walked_logits,
    whole_logits,
    whole_model,
)
from tests.compression.test_prune_model import prune_noting
from tests.conftest import Make
from tests.reference import pruning as reference

HALF = Unstructured(0.5)
every_family = pytest.mark.parametrize("family", tiny.EXPERTS)
NAMES = {"mixtral": ("w1", "w3", "w2"), "qwen2_moe": ("gate_proj", "up_proj", "down_proj")}  # gate, up, down


def fused_inputs(model: nn.Module, block: int, ids: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """By expert, what its first two matrices and its last one are given in transformers' own, fused module."""
    experts: Any = model.get_submodule(f"model.layers.{block}.mlp.experts")
    taken: list[tuple[Tensor, Tensor]] = []
    hook = experts.register_forward_pre_hook(lambda _, given: taken.append((given[0].flatten(0, -2), given[1])))
    with torch.no_grad():
        model(input_ids=ids)
    hook.remove()
    hidden, index = taken[0]
    found = {}
    for number in range(experts.num_experts):
        own = hidden[(index == number).any(-1)]
        gate, up = (own @ experts.gate_up_proj[number].T).chunk(2, -1)
        found[number] = own, experts.act_fn(gate) * up
    return found


@every_family
def test_layers_are_named_as_the_family_stores_them(family: str, imported: Make, original: Make) -> None:
    layers = Checkpoint(imported(family)).layers
    experts = [layer for layer in layers if layer.startswith("model.layers.0.mlp.experts.")]
    assert experts == [f"model.layers.0.mlp.experts.{n}.{name}" for n in range(4) for name in NAMES[family]]
    assert not [layer for layer in layers if layer.rpartition(".")[2] in ("gate", "shared_expert_gate")]  # these route
    if family == "qwen2_moe":
        assert "model.layers.0.mlp.shared_expert.up_proj" in layers


@every_family
@pytest.mark.parametrize("pattern", [HALF, NofM(2, 4)], ids=str)
def test_experts_are_scored_by_the_tokens_sent_to_them(
    family: str, pattern: Any, original: Make, imported: Make, tmp_path: Path, ids: Tensor
) -> None:
    pruned = prune(imported(family), tmp_path / "pruned", wanda, pattern, ids)
    keep, model = all_masks(pruned), whole_model(original(family))
    for layer, mask in keep.items():  # transformers' own model, pruned up to the first block's experts
        if layer.startswith("model.layers.0.self_attn"):
            model.get_parameter(f"{layer}.weight").data.mul_(mask)
    gate, up, down = NAMES[family]
    for number, (hidden, _) in fused_inputs(model, 0, ids).items():
        fused = model.get_parameter("model.layers.0.mlp.experts.gate_up_proj")[number].data
        expected = reference.wanda(fused, hidden, pattern)
        own = torch.cat([keep[f"model.layers.0.mlp.experts.{number}.{name}"] for name in (gate, up)])
        assert int((own != expected).sum()) <= 2  # two scores may come so close that rounding decides
        fused.mul_(own)
    for number, (_, inner) in fused_inputs(model, 0, ids).items():
        weight = model.get_parameter("model.layers.0.mlp.experts.down_proj")[number].data
        own = keep[f"model.layers.0.mlp.experts.{number}.{down}"]
        assert int((own != reference.wanda(weight, inner, pattern)).sum()) <= 2


@every_family
@pytest.mark.parametrize("method", [wanda, sparsegpt], ids=["wanda", "sparsegpt"])
def test_any_batch_split_gives_the_same_mask(
    method: Any, family: str, imported: Make, tmp_path: Path, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    pattern = Unstructured(0.5, method.SCOPES[0])
    whole = all_masks(prune(imported(family), tmp_path / "whole", method, pattern, ids))
    monkeypatch.setattr(batches, "CPU_TOKENS", ids.shape[1])
    split = all_masks(prune(imported(family), tmp_path / "split", method, pattern, ids))
    differ = sum(int((whole[layer] != split[layer]).sum()) for layer in whole)
    assert differ < 2e-3 * sum(mask.numel() for mask in whole.values())


@every_family
def test_pruned_experts_load_in_transformers(family: str, imported: Make, tmp_path: Path, ids: Tensor) -> None:
    pruned = prune(imported(family), tmp_path / "pruned", sparsegpt, Unstructured(0.5, "columns"), ids)
    torch.testing.assert_close(walked_logits(pruned.folder, ids), whole_logits(pruned.folder, ids))
    fused = whole_model(pruned.folder).get_parameter("model.layers.1.mlp.experts.down_proj")
    assert float((fused == 0).float().mean()) == 0.5


@every_family
def test_an_expert_that_saw_no_token_is_pruned_by_magnitude_and_named(
    family: str, imported: Make, tmp_path: Path, ids: Tensor
) -> None:
    few = ids[:1, :1]  # one token, two of four experts
    for name, method in {"wanda": wanda, "sparsegpt": sparsegpt}.items():
        pattern = Unstructured(0.5, method.SCOPES[0])
        pruned, ledger = prune_noting(imported(family), tmp_path / name, method, pattern, few)
        unseen = {layer for layer, notes in ledger.items() if "unseen" in notes}
        experts = {layer.rpartition(".")[0] for layer in unseen}
        assert len(experts) == 2 * pruned.depth
        assert len(unseen) == 3 * len(experts)
        assert all(".experts." in layer for layer in unseen)
        keep, dense = all_masks(pruned), all_tensors(Checkpoint(imported(family)))
        for layer in unseen:
            expected = reference.magnitude(dense[f"{layer}.weight"], None, pattern)
            assert torch.equal(keep[layer], expected)
        assert all(int(mask.sum()) * 2 == mask.numel() for mask in keep.values())


@pytest.mark.parametrize("family", [*tiny.EXPERTS, "gpt2"])
def test_what_transformers_would_not_load_packed_is_not_packed(family: str, imported: Make, tmp_path: Path) -> None:
    kind = "transposed weights" if family == "gpt2" else "experts"
    with pytest.raises(Problem, match=rf"quantize.method: transformers does not load packed {kind}, and .*\n.*none"):
        quantize(Checkpoint(imported(family)), tmp_path / "packed")
