"""Retraining on disk: the loss falls, only what was freed moves, and the mask stays."""

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compression.core.checkpoint import Checkpoint, CheckpointWriter
from compression.core.errors import Problem
from compression.core.masks import revived
from compression.pruning import magnitude
from compression.pruning.pattern import Unstructured
from compression.retraining import METHODS, scale_lora
from compression.retraining import run as retraining
from compression.training.loop import Recipe
from compression.training.text import next_token_loss
from compression.training.whole import load_whole
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
)
from tests.conftest import Make

OPTIONS = {
    "rank": 4,
    "alpha": 8.0,
    "biases": True,
    "norms": True,
    "head": False,
    "embeddings": False,
    "targets": [],
    "start": "broken",
    "checkpointing": False,
    "distillation": 0.0,
    "held_out": 0,
    "check_every": 10,
    "patience": 0,
    "search": [],
    "search_steps": 4,
    "seed": 3,
}
FLOAT = torch.float32
RECIPE = Recipe(steps=25, learning_rate=5e-3, warmup=0.1, clip=1.0)
NAMES = [name for name in METHODS if name not in ("none", "lora")]  # lora leaves an adapter: test_lora.py


@pytest.fixture(scope="module")
def text() -> Tensor:
    return tiny.encode(tiny.sentences(1, 120))


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory, imported: Make, ids: Tensor) -> Checkpoint:
    """An OPT, which has biases, pruned hard by magnitude: there is something to mend."""
    folder = tmp_path_factory.mktemp("retraining") / "opt"
    return prune(imported("opt"), folder, magnitude, Unstructured(0.7), ids)


def retrain(
    source: Checkpoint,
    target: Path,
    text: Tensor,
    method: str = "mask_lora",
    dtype: torch.dtype = torch.float32,
    recipe: Recipe = RECIPE,
    dense: Checkpoint | None = None,
    **options: Any,
) -> tuple[Checkpoint, dict[str, Any]]:
    writer = CheckpointWriter(target, source.folder)
    record = retraining.retrain_model(
        source,
        dense or source,
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


def loss(folder: Path, ids: Tensor) -> float:
    logits = whole_logits(folder, ids)[:, :-1].flatten(0, 1)
    return float(torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()))


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loss_falls_and_the_mask_stays(
    method: str, dtype: torch.dtype, opt: Checkpoint, tmp_path: Path, text: Tensor, ids: Tensor
) -> None:
    retrained, record = retrain(opt, tmp_path / "retrained", text, method, dtype)
    assert len(record["losses"]) == 25
    assert sum(record["losses"][-5:]) / 5 < record["losses"][0] - 0.1
    assert loss(retrained.folder, ids) < loss(opt.folder, ids) - 0.05  # on text that it was not trained on, from disk
    before, after, keep = all_tensors(opt), all_tensors(retrained), all_masks(retrained)
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
        if freed or adapted or method == "full":
            assert not torch.equal(after[name], before[name]), f"{name} did not learn"
        else:
            assert torch.equal(after[name], before[name]), f"{name} was not to move"


def test_record_counts_what_learned(opt: Checkpoint, tmp_path: Path, text: Tensor) -> None:
    short = Recipe(steps=1, learning_rate=1e-3, warmup=0.0, clip=1.0)
    _, record = retrain(opt, tmp_path / "a", text, "mask_lora", recipe=short)
    tensors = all_tensors(opt)
    adapters = sum(OPTIONS["rank"] * (rows + width) for rows, width in opt.layers.values())
    vectors = sum(t.numel() for name, t in tensors.items() if t.ndim == 1)
    assert record["trainable_parameters"] == adapters + vectors
    assert record["trainable_share"] == record["trainable_parameters"] / sum(t.numel() for t in tensors.values())
    assert record["stopped"] == "all steps taken"
    _, record = retrain(opt, tmp_path / "b", text, "subset", recipe=short, norms=False)
    assert record["trainable_parameters"] == sum(t.numel() for n, t in tensors.items() if n.endswith(".bias"))


def test_kept_zero_may_move(opt: Checkpoint, tmp_path: Path, text: Tensor) -> None:
    """A weight that is zero by chance is not pruned: the mask is what counts."""
    layer = "model.decoder.layers.1.fc1"
    writer = CheckpointWriter(tmp_path / "zeroed", opt.folder)
    writer.write_outer(opt.outer())
    for index in range(opt.depth):
        tensors, keep = opt.block(index), opt.block_masks(index, opt.masks())
        if index == 1:
            tensors[f"{layer}.weight"][:] = 0
        writer.write_block(index, tensors, keep)
    writer.finish(opt.depth, lineage(opt))
    retrained, _ = retrain(Checkpoint(tmp_path / "zeroed"), tmp_path / "retrained", text)
    weight, mask = all_tensors(retrained)[f"{layer}.weight"], all_masks(retrained)[layer]
    assert (weight[mask] != 0).any()
    assert (weight[~mask] == 0).all()


@pytest.mark.parametrize("method", NAMES)
def test_killed_and_resumed_gives_the_same_bytes(
    method: str, opt: Checkpoint, tmp_path: Path, text: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, record = retrain(opt, tmp_path / "straight", text, method)
    calls: list[int] = []
    inner = retraining.next_token_loss

    def dying(*arguments: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 17:
            raise Killed
        return inner(*arguments)

    monkeypatch.setattr(retraining, "next_token_loss", dying)
    with pytest.raises(Killed):
        retrain(opt, tmp_path / "killed", text, method)
    resumed, again = retrain(opt, tmp_path / "killed", text, method)
    assert hashes(resumed.folder) == hashes(straight.folder)
    assert again == record
    assert len(calls) == 17 + 15 + 2  # it went on at step 10; two more tell what the merge did


def test_other_seed_other_bytes(opt: Checkpoint, tmp_path: Path, text: Tensor) -> None:
    one, _ = retrain(opt, tmp_path / "one", text, seed=1)
    two, _ = retrain(opt, tmp_path / "two", text, seed=2)
    assert hashes(one.folder)["block-00001.safetensors"] != hashes(two.folder)["block-00001.safetensors"]


@pytest.mark.parametrize("family", tiny.CAUSAL)
def test_every_causal_family(family: str, imported: Make, tmp_path: Path, text: Tensor, ids: Tensor) -> None:
    pruned = prune(imported(family), tmp_path / "pruned", magnitude, Unstructured(0.6), ids)
    recipe = Recipe(steps=6, learning_rate=5e-3, warmup=0.1, clip=1.0)
    retrained, record = retrain(pruned, tmp_path / "retrained", text, recipe=recipe)
    assert record["losses"][-1] < record["losses"][0]
    assert all_tensors(retrained).keys() == all_tensors(pruned).keys()  # a tied head is still not stored
    torch.testing.assert_close(
        walked_logits(retrained.folder, ids), whole_logits(retrained.folder, ids), rtol=1e-4, atol=1e-4
    )


def test_nothing_to_train_is_said(pruned: Checkpoint, tmp_path: Path, text: Tensor) -> None:
    with pytest.raises(Problem, match="nothing to train"):  # a llama has no biases
        retrain(pruned, tmp_path / "x", text, "subset", norms=False)


def test_dense_model_needs_no_mask_for_norms(imported: Make, tmp_path: Path, text: Tensor) -> None:
    retrained, record = retrain(Checkpoint(imported("llama")), tmp_path / "x", text, "mask_lora")
    assert record["trainable_parameters"] == 7 * 32  # the norms: no mask, no adapter
    assert "masks.safetensors" not in hashes(retrained.folder)


def test_a_float32_model_keeps_its_precision_when_trained_in_bfloat16(
    opt: Checkpoint, tmp_path: Path, text: Tensor
) -> None:
    """What an update did not touch is not rounded to the type in which it was computed."""
    still = Recipe(steps=1, learning_rate=1e-12, warmup=0.0, clip=1.0)
    retrained, _ = retrain(opt, tmp_path / "retrained", text, "mask_lora", torch.bfloat16, still)
    before, after = all_tensors(opt), all_tensors(retrained)
    for layer in opt.layers:
        assert torch.equal(before[f"{layer}.weight"], after[f"{layer}.weight"]), layer


def test_an_encoder_is_refused(imported: Make, tmp_path: Path, text: Tensor, ids: Tensor) -> None:
    bert = prune(imported("bert"), tmp_path / "bert", magnitude, Unstructured(0.5), ids)
    with pytest.raises(Problem, match="an encoder cannot be trained"):
        retrain(bert, tmp_path / "retrained", text)


def test_only_lora_prune_jumps_at_the_merge(opt: Checkpoint, tmp_path: Path, text: Tensor) -> None:
    jumps = {name: retrain(opt, tmp_path / name, text, name)[1]["merge_jump"] for name in NAMES}
    assert jumps.pop("lora_prune") > 0.01
    assert set(jumps.values()) == {0.0}


def test_ranks_of_scale_lora_stay_equal_from_the_papers_start_only(opt: Checkpoint) -> None:
    text = tiny.encode(tiny.sentences(1, 40))
    for start, ranks in (("paper", 1), ("broken", OPTIONS["rank"])):
        model = load_whole(opt.folder, all_tensors(opt), CPU, torch.float32)
        parameters, _ = scale_lora.attach(model, all_masks(opt), OPTIONS | {"start": start})
        optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            next_token_loss(model, text[:4]).backward()
            optimizer.step()
        adapter = parameters["model.decoder.layers.0.fc1.A"]
        assert torch.linalg.matrix_rank(adapter.detach(), rtol=1e-4) == ranks


@pytest.mark.parametrize("kind", ["head", "embeddings"])
def test_head_and_embeddings_are_whole_matrices(kind: str, imported: Make, tmp_path: Path, text: Tensor) -> None:
    """A head of its own in llama; in qwen2 it is the embedding, and either switch frees the one matrix."""
    short = Recipe(steps=2, learning_rate=1e-3, warmup=0.0, clip=1.0)
    for family, names in (
        ("llama", {"head": "lm_head.weight", "embeddings": "model.embed_tokens.weight"}),
        ("qwen2", {"head": "model.embed_tokens.weight", "embeddings": "model.embed_tokens.weight"}),
    ):
        source = Checkpoint(imported(family))
        options = {"biases": False, "norms": False, kind: True}
        retrained, record = retrain(source, tmp_path / family, text, "subset", recipe=short, **options)
        before, after = all_tensors(source), all_tensors(retrained)
        assert [name for name in before if not torch.equal(before[name], after[name])] == [names[kind]]
        assert record["trainable_parameters"] == before[names[kind]].numel()


def test_only_targeted_layers_get_adapters(opt: Checkpoint, tmp_path: Path, text: Tensor) -> None:
    short = Recipe(steps=2, learning_rate=1e-3, warmup=0.0, clip=1.0)
    vectors = {"biases": False, "norms": False}
    retrained, _ = retrain(opt, tmp_path / "x", text, recipe=short, targets=["*.q_proj", "*.1.fc2"], **vectors)
    before, after = all_tensors(opt), all_tensors(retrained)
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    expected = [name for name in before if "q_proj.weight" in name or "1.fc2.weight" in name]
    assert moved == expected
    with pytest.raises(Problem, match=r"retrain.targets: `\*.query` matches no pruned layer\n.*q_proj"):
        retrain(opt, tmp_path / "y", text, targets=["*.query"])


def test_checkpointing_changes_nothing_but_memory(opt: Checkpoint, tmp_path: Path, text: Tensor) -> None:
    plain, _ = retrain(opt, tmp_path / "plain", text)
    frugal, _ = retrain(opt, tmp_path / "frugal", text, checkpointing=True)
    assert hashes(plain.folder) == hashes(frugal.folder)


def test_accumulated_batches_are_one_large_batch(opt: Checkpoint, tmp_path: Path, text: Tensor) -> None:
    large, one = retrain(opt, tmp_path / "large", text)
    parts = Recipe(RECIPE.steps, RECIPE.learning_rate, RECIPE.warmup, RECIPE.clip, accumulation=2)
    target = tmp_path / "parts"
    writer = CheckpointWriter(target, opt.folder)
    module = import_module(METHODS["mask_lora"])
    other = retraining.retrain_model(opt, opt, writer, journal(target), module, OPTIONS, parts, text, 2, CPU, FLOAT)
    writer.finish(opt.depth, lineage(opt))
    assert other["losses"] == pytest.approx(one["losses"], rel=1e-4)
    for (name, first), second in zip(all_tensors(large).items(), all_tensors(Checkpoint(target)).values(), strict=True):
        if "k_proj.bias" not in name:  # moves no score against another: its gradient is rounding, which Adam blows up
            torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-3, msg=name)


def test_what_is_held_out_is_not_trained_on_and_the_best_look_wins(
    opt: Checkpoint, tmp_path: Path, text: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    inner = retraining.next_token_loss

    def spy(model: Any, ids: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            seen.append(ids)
        return inner(model, ids)

    monkeypatch.setattr(retraining, "next_token_loss", spy)
    text = text[:12]
    hot = Recipe(steps=60, learning_rate=3e-2, warmup=0.1, clip=1.0)
    retrained, record = retrain(opt, tmp_path / "x", text, "full", recipe=hot, held_out=4, check_every=5, patience=2)
    trained_on = {tuple(row.tolist()) for ids in seen for row in ids}
    assert trained_on == {tuple(row.tolist()) for row in text[:8]}
    looks = record["held_out"]
    best = looks.index(min(looks))
    assert 0 < best < len(looks) - 1, "eight sentences are learned by heart: the loss on others must rise again"
    assert record["stopped"].startswith("no better on held-out text for 2 looks at step")
    assert len(record["losses"]) < 60
    assert loss(retrained.folder, text[8:]) == pytest.approx(min(looks), abs=1e-4)


def test_killed_with_held_out_text_and_resumed_gives_the_same_bytes(
    opt: Checkpoint, tmp_path: Path, text: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"held_out": 4, "check_every": 5, "search": [1e-3, 2e-2], "search_steps": 3}
    straight, record = retrain(opt, tmp_path / "straight", text[:12], **options)
    inner = retraining.next_token_loss
    for kill_at in (5, 30):  # in the search; behind a save of the training
        calls: list[int] = []

        def dying(*arguments: Any, calls: list[int] = calls, kill_at: int = kill_at) -> Tensor:
            calls.append(1)
            if len(calls) == kill_at:
                raise Killed
            return inner(*arguments)

        monkeypatch.setattr(retraining, "next_token_loss", dying)
        with pytest.raises(Killed):
            retrain(opt, tmp_path / "killed", text[:12], **options)
    monkeypatch.setattr(retraining, "next_token_loss", inner)
    resumed, again = retrain(opt, tmp_path / "killed", text[:12], **options)
    assert hashes(resumed.folder) == hashes(straight.folder)
    assert again == record


def test_the_search_takes_the_rate_that_suits(opt: Checkpoint, tmp_path: Path, text: Tensor) -> None:
    rates = [1e-6, 5e-3, 10.0]
    _, record = retrain(opt, tmp_path / "x", text, held_out=8, search=rates)
    assert record["learning_rate"] == 5e-3
    assert list(record["searched"]) == ["1e-06", "0.005", "10.0"]
    assert record["searched"]["0.005"] == min(record["searched"].values())
    # The search leaves no trace in what is trained after it.
    _, straight = retrain(opt, tmp_path / "y", text, held_out=8, recipe=RECIPE)
    assert record["losses"] == straight["losses"]


def test_distilled_model_comes_closer_to_its_teacher(
    opt: Checkpoint, imported: Make, tmp_path: Path, text: Tensor, ids: Tensor
) -> None:
    dense = Checkpoint(imported("opt"))

    def distance(checkpoint: Checkpoint) -> float:
        q, p = (whole_logits(folder, ids).log_softmax(-1) for folder in (dense.folder, checkpoint.folder))
        return float((q.exp() * (q - p)).sum(-1).mean())

    told, _ = retrain(opt, tmp_path / "text", text, dense=dense)
    taught, _ = retrain(opt, tmp_path / "teacher", text, dense=dense, distillation=1.0)
    assert distance(taught) < 0.9 * distance(told) < distance(opt)
