"""Reconstruction on disk: every part of every block comes nearer to the dense one, a block at a time."""

import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compression.core.checkpoint import Checkpoint, CheckpointWriter
from compression.core.errors import Problem
from compression.core.masks import revived
from compression.core.skeleton import Skeleton, linears
from compression.pruning import magnitude
from compression.pruning.pattern import Unstructured
from compression.retraining import METHODS, reconstruct
from compression.retraining.parts import Part, find_parts
from compression.training.loop import Recipe
from compression.training.masked_linear import attach
from compression.training.text import Shuffled
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
    walked_logits,
    whole_logits,
    whole_model,
)
from tests.compression.test_surgeon_run import make_task, operate
from tests.conftest import Make
from tests.reference import reconstruction
from tests.reference.training import rates

OPTIONS = {
    "objective": "block",
    "targets": [],
    "rank": 4,
    "alpha": 8.0,
    "biases": True,
    "norms": True,
    "head": False,
    "embeddings": False,
    "start": "broken",
    "seed": 3,
}
RECIPE = Recipe(steps=25, learning_rate=5e-3, warmup=0.1, clip=1.0)
SHORT = Recipe(steps=6, learning_rate=5e-3, warmup=0.1, clip=1.0)
NAMES = [name for name in METHODS if name not in ("none", "lora")]
PARTS = {"block": ["block"], "half_block": ["attention", "mlp"]}


@pytest.fixture(scope="module")
def text() -> Tensor:
    """Calibration text int64 [12, 64]."""
    return tiny.encode(tiny.sentences(1, 30))[:12]


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory, imported: Make, ids: Tensor) -> Checkpoint:
    """An OPT, which has biases, pruned hard by magnitude: there is something to mend."""
    folder = tmp_path_factory.mktemp("reconstruct") / "opt"
    return prune(imported("opt"), folder, magnitude, Unstructured(0.7), ids)


@pytest.fixture(scope="module")
def dense(imported: Make) -> Checkpoint:
    return Checkpoint(imported("opt"))


def rebuild(
    source: Checkpoint,
    dense: Checkpoint,
    target: Path,
    text: Tensor,
    method: str = "mask_lora",
    dtype: torch.dtype = torch.float32,
    recipe: Recipe = RECIPE,
    **options: Any,
) -> tuple[Checkpoint, dict[str, Any]]:
    writer = CheckpointWriter(target, source.folder)
    record = reconstruct.reconstruct_model(
        source,
        dense,
        writer,
        journal(target),
        import_module(METHODS[method]),
        OPTIONS | options,
        recipe,
        text,
        4,
        CPU,
        dtype,
    )
    writer.finish(source.depth, lineage(source))
    return Checkpoint(target), record


@pytest.mark.parametrize("objective", PARTS)
@pytest.mark.parametrize("method", NAMES)
def test_every_part_comes_nearer_and_the_mask_stays(
    method: str, objective: str, opt: Checkpoint, dense: Checkpoint, tmp_path: Path, text: Tensor
) -> None:
    rebuilt, record = rebuild(opt, dense, tmp_path / "rebuilt", text, method, objective=objective)
    errors = record["block_errors"]
    assert [(error["block"], error["part"]) for error in errors] == [(n, p) for n in range(3) for p in PARTS[objective]]
    assert all(error["learned"] and error["after"] < 0.97 * error["before"] for error in errors), errors
    assert len(record["losses"]) == 25
    assert record["losses"][-1] < record["losses"][0]
    before, after, keep = all_tensors(opt), all_tensors(rebuilt), all_masks(rebuilt)
    assert {layer: mask.tolist() for layer, mask in keep.items()} == {
        layer: mask.tolist() for layer, mask in all_masks(opt).items()
    }
    assert all(revived(after[f"{layer}.weight"], mask) == 0 for layer, mask in keep.items())
    assert {name: (t.dtype, t.shape) for name, t in after.items()} == {
        name: (t.dtype, t.shape) for name, t in before.items()
    }
    for name in before:
        freed = name.endswith(".bias") or "norm" in name
        adapted = method != "subset" and name.removesuffix(".weight") in keep
        if ".layers." in name and (freed or adapted or method == "full"):
            assert not torch.equal(after[name], before[name]), f"{name} did not learn"
        else:
            assert torch.equal(after[name], before[name]), f"{name} was not to move"


@pytest.mark.parametrize("objective", PARTS)
def test_bfloat16_and_the_whole_model_gains(
    objective: str, opt: Checkpoint, dense: Checkpoint, tmp_path: Path, text: Tensor, ids: Tensor
) -> None:
    rebuilt, record = rebuild(opt, dense, tmp_path / "x", text, "full", torch.bfloat16, objective=objective)
    assert all(error["after"] < error["before"] for error in record["block_errors"])
    wanted = whole_logits(dense.folder, ids)
    distances = [float((whole_logits(one.folder, ids) - wanted).square().mean()) for one in (rebuilt, opt)]
    assert distances[0] < 0.7 * distances[1]  # text that it was not reconstructed on


@pytest.mark.parametrize("method", ["full", "mask_lora"])
def test_equals_the_naive_twin(method: str, imported: Make, pruned: Checkpoint, tmp_path: Path, text: Tensor) -> None:
    recipe = Recipe(steps=5, learning_rate=2e-3, warmup=0.2, clip=0.05)  # a clip that bites
    original = Checkpoint(imported("llama"))
    rebuilt, record = rebuild(pruned, original, tmp_path / "x", text, method, recipe=recipe)
    keep = all_masks(pruned)
    model = whole_model(pruned.folder).double()
    blocks = [f"{pruned.blocks}.{index}" for index in range(pruned.depth)]
    adapters = {}
    if method == "mask_lora":
        for block in blocks:
            own = {layer: mask for layer, mask in keep.items() if layer.startswith(f"{block}.")}
            layers = attach(whole_model(pruned.folder), own, OPTIONS["rank"], OPTIONS["alpha"], OPTIONS["seed"])
            adapters |= {name: (layer.A.detach().double(), layer.B.detach().double()) for name, layer in layers.items()}
    draw = Shuffled(torch.arange(len(text)), 4, OPTIONS["seed"])
    weights, errors = reconstruction.reconstruct(
        whole_model(original.folder).double(),
        model,
        blocks,
        keep,
        adapters,
        OPTIONS["alpha"] / OPTIONS["rank"],
        text,
        model.get_submodule("model.embed_tokens")(text).detach(),
        [draw(step).tolist() for step in range(recipe.steps)],
        rates(recipe.steps, recipe.learning_rate, recipe.warmup),
        recipe.clip,
    )
    for found, (before, after) in zip(record["block_errors"], errors, strict=True):
        assert found["before"] == pytest.approx(before, rel=1e-4)
        assert found["after"] == pytest.approx(after, rel=1e-3)
    start, ended = all_tensors(pruned), all_tensors(rebuilt)
    assert ended.keys() == weights.keys()
    for name, tensor in ended.items():
        # Adam takes a step of full length where the gradient is next to nothing, so single entries may differ.
        moved, wanted = tensor - start[name], weights[name] - start[name]
        assert (moved - wanted).norm() <= 0.01 * wanted.norm() + 1e-6, name


def test_error_and_its_unit(opt: Checkpoint, dense: Checkpoint, tmp_path: Path, text: Tensor) -> None:
    """Of block 0: what went in is the same in both, and an error of 1 is that of leaving the block out."""
    _, record = rebuild(opt, dense, tmp_path / "x", text, recipe=SHORT)
    outputs = []
    for checkpoint in (opt, dense):
        skeleton = make_skeleton(checkpoint.folder)
        entered = skeleton.begin(text)
        skeleton.load(0)
        outputs.append(skeleton.run(0, entered, text))
    expected = (outputs[0] - outputs[1]).square().mean() / (outputs[1] - entered).square().mean()
    assert record["block_errors"][0]["before"] == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("objective", PARTS)
@pytest.mark.parametrize("rate", [5e-3, 10.0], ids=["learned", "put back"])
def test_the_next_block_is_given_what_the_written_weights_give(
    rate: float, objective: str, opt: Checkpoint, dense: Checkpoint, tmp_path: Path, text: Tensor
) -> None:
    recipe = Recipe(steps=3, learning_rate=rate, warmup=0.0, clip=1.0)
    rebuilt, record = rebuild(opt, dense, tmp_path / "x", text, "full", recipe=recipe, objective=objective)
    assert {error["learned"] for error in record["block_errors"]} == {rate < 1}
    finished, state = journal(tmp_path / "x").load()
    assert finished == 3
    skeleton = make_skeleton(rebuilt.folder)
    hidden = skeleton.begin(text)
    for index in range(skeleton.depth):
        skeleton.load(index)
        hidden = skeleton.run(index, hidden, text)
    torch.testing.assert_close(state["hidden"], hidden, rtol=1e-4, atol=1e-4)


def test_record_counts_what_learned(opt: Checkpoint, dense: Checkpoint, tmp_path: Path, text: Tensor) -> None:
    tensors = all_tensors(opt)
    inside = {name: t for name, t in tensors.items() if ".layers." in name}
    adapters = sum(OPTIONS["rank"] * (rows + width) for rows, width in opt.layers.values())
    vectors = sum(t.numel() for t in inside.values() if t.ndim == 1)
    for objective in PARTS:
        _, record = rebuild(opt, dense, tmp_path / objective, text, recipe=SHORT, objective=objective)
        assert record["trainable_parameters"] == adapters + vectors
        assert record["trainable_share"] == record["trainable_parameters"] / sum(t.numel() for t in tensors.values())
        assert record["stopped"] == "all steps taken"
    _, record = rebuild(opt, dense, tmp_path / "full", text, "full", recipe=SHORT, objective="half_block")
    assert record["trainable_parameters"] == sum(t.numel() for t in inside.values())


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_halves_part_the_block(family: str, imported: Make, ids: Tensor) -> None:
    skeleton = make_skeleton(imported(family))
    hidden = skeleton.begin(ids)
    block = skeleton.load(1)

    def run() -> Tensor:
        return skeleton.run(1, hidden, ids)

    (whole,) = find_parts(block, run, "block")
    attention, rest = find_parts(block, run, "half_block")
    assert not attention.modules & rest.modules
    assert attention.modules | rest.modules == whole.modules
    names = [name.removeprefix(f"{skeleton.path}.1.") for name in linears(block, f"{skeleton.path}.1")]
    count = 2 if family in ("gpt_neox", "gpt2") else 4  # q, k, v and out; these two have q, k and v in one
    assert [name for name in names if name in attention.modules] == names[:count]
    assert not any(handle for module in block.modules() for handle in module._forward_hooks)
    before = {"llama": "input_layernorm", "opt": "self_attn_layer_norm", "gpt_neox": "input_layernorm"}
    assert before.get(family, names[0]) in attention.modules


def test_a_block_without_halves_is_one_part() -> None:
    mlp = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    parts = find_parts(mlp, lambda: mlp(torch.ones(2, 4)), "half_block")
    assert parts == [Part("block", frozenset({"0", "2"}))]
    held = nn.Sequential(mlp)
    parts = find_parts(held, lambda: held(torch.ones(2, 4)), "half_block")
    assert parts == [Part("block", frozenset({"0.0", "0.2"}))]


@pytest.mark.parametrize("objective", PARTS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family(family: str, objective: str, imported: Make, tmp_path: Path, text: Tensor, ids: Tensor) -> None:
    original = Checkpoint(imported(family))
    source = prune(original.folder, tmp_path / "pruned", magnitude, Unstructured(0.6), ids)
    rebuilt, record = rebuild(source, original, tmp_path / "rebuilt", text, recipe=SHORT, objective=objective)
    assert len(record["block_errors"]) == 3 * len(PARTS[objective])
    assert all(error["after"] < error["before"] for error in record["block_errors"]), record["block_errors"]
    assert all_tensors(rebuilt).keys() == all_tensors(source).keys()
    torch.testing.assert_close(
        walked_logits(rebuilt.folder, ids), whole_logits(rebuilt.folder, ids), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("method", ["mask_lora", "full"])
@pytest.mark.parametrize(("objective", "last"), [("block", 45), ("half_block", 75)])
def test_killed_and_resumed_gives_the_same_bytes(
    method: str,
    objective: str,
    last: int,
    opt: Checkpoint,
    dense: Checkpoint,
    tmp_path: Path,
    text: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    straight, record = rebuild(opt, dense, tmp_path / "straight", text, method, objective=objective)
    calls: list[int] = []
    inner = Shuffled.__call__

    def dying(self: Shuffled, step: int) -> Tensor:
        calls.append(1)
        if len(calls) == last:
            raise Killed
        return inner(self, step)

    monkeypatch.setattr(Shuffled, "__call__", dying)
    with pytest.raises(Killed):
        rebuild(opt, dense, tmp_path / "killed", text, method, objective=objective)
    parts = sorted(folder.name for folder in journal(tmp_path / "killed").folder.glob("block-*"))
    assert parts == [f"block-00001-{part}" for part in PARTS[objective]][: len(parts)]
    assert parts, "nothing is left of the block that was under way"
    resumed, again = rebuild(opt, dense, tmp_path / "killed", text, method, objective=objective)
    assert hashes(resumed.folder) == hashes(straight.folder)
    assert again == record
    every = 1 + 3 * len(PARTS[objective]) * 27  # the shape; 25 steps and two looks at the merge
    assert last < len(calls) < last + every - 20
    assert not list(journal(tmp_path / "killed").folder.glob("block-*"))
    finished, same = rebuild(opt, dense, tmp_path / "killed", text, method, objective=objective)
    assert same == record  # killed between the last block and the manifest
    assert hashes(finished.folder) == hashes(straight.folder)


def test_same_bytes_on_every_run_and_others_with_another_seed(
    opt: Checkpoint, dense: Checkpoint, tmp_path: Path, text: Tensor
) -> None:
    one, two, other = (
        hashes(rebuild(opt, dense, tmp_path / name, text, recipe=SHORT, objective="half_block", seed=seed)[0].folder)
        for name, seed in (("one", 1), ("two", 1), ("other", 2))
    )
    assert one == two
    assert one["block-00001.safetensors"] != other["block-00001.safetensors"]


@pytest.mark.parametrize("objective", PARTS)
def test_one_block_in_memory(
    objective: str, opt: Checkpoint, dense: Checkpoint, tmp_path: Path, text: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner, seen = Skeleton.load, []

    def load(self: Skeleton, index: int) -> nn.Module:
        block = inner(self, index)
        every = self.model.get_submodule(self.path).children()
        seen.append([n for n, one in enumerate(every) if any(not p.is_meta for p in one.parameters())])
        return block

    monkeypatch.setattr(Skeleton, "load", load)
    rebuild(opt, dense, tmp_path / "x", text, recipe=SHORT, objective=objective)
    assert len(seen) > 9
    assert all(len(blocks) == 1 for blocks in seen)


@pytest.mark.parametrize("objective", PARTS)
def test_a_part_that_gets_worse_stays_as_it_was(
    objective: str, opt: Checkpoint, dense: Checkpoint, tmp_path: Path, text: Tensor
) -> None:
    wild = Recipe(steps=4, learning_rate=10.0, warmup=0.0, clip=1.0)
    rebuilt, record = rebuild(opt, dense, tmp_path / "x", text, "full", recipe=wild, objective=objective)
    assert all(not error["learned"] and error["after"] == error["before"] for error in record["block_errors"])
    before, after = all_tensors(opt), all_tensors(rebuilt)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_an_unpruned_model_has_nothing_to_mend(dense: Checkpoint, tmp_path: Path, text: Tensor) -> None:
    rebuilt, record = rebuild(dense, dense, tmp_path / "x", text, "subset", recipe=SHORT)
    assert all(error["before"] == error["after"] == 0 for error in record["block_errors"])
    assert hashes(rebuilt.folder)["block-00000.safetensors"] == hashes(dense.folder)["block-00000.safetensors"]


def test_only_targets_are_adapted(opt: Checkpoint, dense: Checkpoint, tmp_path: Path, text: Tensor) -> None:
    """A pattern that no layer of one half, or of one block, matches is no mistake."""
    for objective in PARTS:
        rebuilt, _ = rebuild(
            opt, dense, tmp_path / objective, text, recipe=SHORT, objective=objective, targets=["*.layers.1.*.q_proj"]
        )
        before, after = all_tensors(opt), all_tensors(rebuilt)
        moved = [layer for layer in opt.layers if not torch.equal(before[f"{layer}.weight"], after[f"{layer}.weight"])]
        assert moved == ["model.decoder.layers.1.self_attn.q_proj"]
    with pytest.raises(Problem, match="matches no pruned layer"):
        rebuild(opt, dense, tmp_path / "none", text, targets=["*.w_proj"])


def test_only_lora_prune_jumps_at_the_merge(opt: Checkpoint, dense: Checkpoint, tmp_path: Path, text: Tensor) -> None:
    jumps = {name: rebuild(opt, dense, tmp_path / name, text, name, recipe=SHORT)[1]["merge_jump"] for name in NAMES}
    assert jumps.pop("lora_prune") > 0
    assert set(jumps.values()) == {0.0}


def test_a_float32_model_keeps_its_precision_in_bfloat16(
    opt: Checkpoint, dense: Checkpoint, tmp_path: Path, text: Tensor
) -> None:
    rebuilt, _ = rebuild(
        opt, dense, tmp_path / "x", text, dtype=torch.bfloat16, recipe=SHORT, targets=["*.fc1"], norms=False
    )
    before, after = all_tensors(opt), all_tensors(rebuilt)
    for name in before:
        if name.endswith((".fc2.weight", "norm.weight")):
            assert torch.equal(before[name], after[name]), name


def test_scales_stay_with_weights_that_stay(opt: Checkpoint, dense: Checkpoint, tmp_path: Path, text: Tensor) -> None:
    """A grid is worth nothing once the weights have left it."""
    writer = CheckpointWriter(tmp_path / "scaled", opt.folder)
    writer.write_outer(opt.outer())
    for index in range(opt.depth):
        keep = opt.block_masks(index, opt.masks())
        writer.write_block(index, opt.block(index), keep, {layer: torch.ones(1, 1) for layer in keep})
    writer.finish(opt.depth, lineage(opt))
    scaled = Checkpoint(tmp_path / "scaled")
    moved, _ = rebuild(scaled, dense, tmp_path / "moved", text, "mask_lora", recipe=SHORT)
    stayed, _ = rebuild(scaled, dense, tmp_path / "stayed", text, "subset", recipe=SHORT)
    assert moved.scales() == {}
    assert stayed.scales().keys() == scaled.scales().keys()


def test_nothing_to_train_is_said(imported: Make, pruned: Checkpoint, tmp_path: Path, text: Tensor) -> None:
    original = Checkpoint(imported("llama"))
    for objective in PARTS:
        with pytest.raises(Problem, match="nothing to train in block 0"):  # a llama has no biases
            rebuild(pruned, original, tmp_path / objective, text, "subset", norms=False, objective=objective)


@pytest.mark.parametrize("kind", ["head", "embeddings"])
def test_what_lies_outside_the_blocks_is_refused(
    kind: str, opt: Checkpoint, dense: Checkpoint, tmp_path: Path, text: Tensor
) -> None:
    with pytest.raises(Problem, match="outside the blocks"):
        rebuild(opt, dense, tmp_path / "x", text, **{kind: True})


def test_an_adapter_beside_the_weights_is_refused(
    opt: Checkpoint, dense: Checkpoint, tmp_path: Path, text: Tensor
) -> None:
    with pytest.raises(Problem, match="an adapter that is not merged"):
        rebuild(opt, dense, tmp_path / "x", text, "lora")


def test_another_model_is_refused(pruned: Checkpoint, dense: Checkpoint, tmp_path: Path, text: Tensor) -> None:
    with pytest.raises(Problem, match="other layers"):
        rebuild(pruned, dense, tmp_path / "x", text)


def test_a_broken_dense_model_is_named(opt: Checkpoint, dense: Checkpoint, tmp_path: Path, text: Tensor) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(dense.folder, broken)
    writer = CheckpointWriter(broken, dense.folder)
    tensors = dense.block(1)
    tensors["model.decoder.layers.1.fc1.weight"][0, 0] = torch.nan
    writer.write_block(1, tensors)
    writer.finish(dense.depth, lineage(dense))
    with pytest.raises(Problem, match=r"layers\.1: the dense block gives NaN"):
        rebuild(opt, Checkpoint(broken), tmp_path / "x", text, recipe=SHORT)


@pytest.mark.parametrize("objective", PARTS)
def test_a_model_that_got_smaller_learns_from_the_one_it_was(
    objective: str, imported: Make, tmp_path: Path, text: Tensor
) -> None:
    """The dense block has more units and heads than the one that learns; what both give has the same width."""
    source = Checkpoint(imported("llama"))
    smaller, _ = operate(make_task(source, "units+heads", 0.3), tmp_path / "smaller", text)
    assert smaller.layers != source.layers
    rebuilt, record = rebuild(smaller, source, tmp_path / "rebuilt", text, recipe=SHORT, objective=objective)
    assert all(part["after"] < part["before"] for part in record["block_errors"] if part["learned"])
    assert sum(part["learned"] for part in record["block_errors"]) >= len(record["block_errors"]) / 2
    assert {n: t.shape for n, t in all_tensors(rebuilt).items()} == {
        n: t.shape for n, t in all_tensors(smaller).items()
    }
