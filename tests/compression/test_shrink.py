"""The smaller checkpoint gives the logits of the masked one, and the rest of the chain takes it."""

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compression.core.checkpoint import Checkpoint, CheckpointWriter
from compression.core.errors import Problem
from compression.core.files import read_tensors
from compression.core.masks import revived
from compression.evaluation.size import measure_size
from compression.export import compact, gguf
from compression.export.vllm import vllm_faults
from compression.importing import import_model
from compression.quantization.packed import block_reader
from compression.retraining import METHODS
from compression.retraining.run import retrain_model
from compression.surgeon.shrink import STRUCTURES, Shrunk, shrink
from compression.surgeon.structures import Key, Kind, Structure, counts, find_structures, left_out, remove
from compression.surgeon.widths import read_config
from compression.training.loop import Recipe
from tests import tiny
from tests.compression.helpers import (
    CPU,
    all_masks,
    all_tensors,
    hashes,
    journal,
    lineage,
    quantize,
    walked_logits,
    whole_logits,
    whole_model,
)
from tests.compression.test_gguf import byte_level, read_back
from tests.conftest import Make

WITH_HEADS = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"]
UNITS = {"same": [48, 48, 48], "different": [40, 16, 56]}
GROUPS = {"same": [1, 1, 1], "different": [1, 2, 1]}

Kept = dict[Key, Tensor]


def kinds_of(family: str) -> list[Kind]:
    return ["units", "heads"] if family in WITH_HEADS else ["units"]


def drawn(structures: dict[Key, Structure], stay: dict[Kind, list[int]]) -> Kept:
    """So many structures of each block and kind at random."""
    draw = torch.Generator().manual_seed(3)
    return {
        (index, kind): torch.randperm(structure.number, generator=draw)[: stay[kind][index]].sort().values
        for (index, kind), structure in structures.items()
    }


def masked(source: Checkpoint, folder: Path, structures: dict[Key, Structure], kept: Kept) -> Checkpoint:
    """The model with all other structures zero, in its old shapes."""
    writer = CheckpointWriter(folder, source.folder)
    for index in range(source.depth):
        tensors, keep = source.block(index), {}
        for (block, kind), structure in structures.items():
            if block == index:
                tensors, masks = remove(tensors, structure, left_out(structure, kept[block, kind]))
                tensors[f"{structure.reader}.weight"] = tensors[f"{structure.reader}.weight"] * masks[structure.reader]
                keep |= masks
        writer.write_block(index, tensors, keep)
    writer.write_outer(source.outer())
    writer.finish(source.depth, lineage(source))
    return Checkpoint(folder)


def cut(source: Checkpoint, folder: Path, stay: dict[Kind, list[int]], multiple: int = 8) -> tuple[Checkpoint, Shrunk]:
    """Random structures removed by mask into `folder`/masked, and that made small in `folder`/small."""
    structures = find_structures(source, list(stay))
    kept = drawn(structures, stay)
    zeroed = masked(source, folder / "masked", structures, kept)
    config = read_config(source.folder)
    allowed = {kind: counts(config, structures[0, kind], multiple) for kind in stay}
    writer = CheckpointWriter(folder / "small", zeroed.folder)
    shrunk = shrink(zeroed, writer, structures, kept, allowed)
    writer.finish(source.depth, lineage(source) | {"layers": shrunk.layers}, shrunk.config)
    return Checkpoint(folder / "small"), shrunk


@pytest.mark.parametrize("widths", UNITS)
@pytest.mark.parametrize("family", tiny.PLAIN)
def test_smaller_model_gives_the_logits_of_the_masked_one(
    family: str, widths: str, imported: Make, tmp_path: Path, ids: Tensor
) -> None:
    source = Checkpoint(imported(family))
    stay: dict[Kind, list[int]] = {"units": UNITS[widths], "heads": GROUPS[widths]}
    small, shrunk = cut(source, tmp_path, {kind: stay[kind] for kind in kinds_of(family)})
    expected = whole_logits(tmp_path / "masked", ids)
    torch.testing.assert_close(whole_logits(small.folder, ids), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(walked_logits(small.folder, ids), expected, rtol=1e-4, atol=1e-4)
    assert (expected - whole_logits(source.folder, ids)).abs().max() > 0.1  # what was removed mattered

    before, after = measure_size(Checkpoint(tmp_path / "masked")), measure_size(small)
    assert after["bytes"] < before["bytes"]
    assert after["prunable_parameters"] == sum(rows * width for rows, width in small.layers.values())
    dropped = round(after["sparsity"] * after["prunable_parameters"])
    assert dropped == shrunk.padding
    assert (dropped == 0) == (widths == "same")
    # What is neither pruned nor padding is as much as before: nothing that stays was lost.
    assert after["prunable_parameters"] - dropped == round((1 - before["sparsity"]) * before["prunable_parameters"])
    for layer, mask in all_masks(small).items():
        assert list(mask.shape) == small.layers[layer]
        assert revived(all_tensors(small)[f"{layer}.weight"], mask) == 0


def test_shapes_and_what_stayed_are_told(imported: Make, tmp_path: Path) -> None:
    small, shrunk = cut(Checkpoint(imported("llama")), tmp_path, {"units": [40, 16, 50], "heads": [1, 1, 1]})
    config = small.config()
    assert shrunk.widths == {"units": 56, "heads": 1}  # 50 and 6 of padding
    assert (config["intermediate_size"], config["num_attention_heads"]) == (56, 2)
    assert (config["num_key_value_heads"], config["head_dim"], config["hidden_size"]) == (1, 8, 32)
    assert small.layers["model.layers.2.mlp.down_proj"] == [32, 56]
    assert small.layers["model.layers.0.self_attn.k_proj"] == [8, 32]
    assert shrunk.padding == 3 * 32 * ((56 - 40) + (56 - 16) + (56 - 50))
    kept = read_tensors(small.folder / STRUCTURES)
    assert {name: len(indices) for name, indices in kept.items()} == {
        "0/units": 40, "1/units": 16, "2/units": 50, "0/heads": 1, "1/heads": 1, "2/heads": 1,
    }  # fmt: skip
    dense, own = all_tensors(Checkpoint(imported("llama"))), all_tensors(small)
    name = "model.layers.2.mlp.up_proj.weight"
    assert torch.equal(own[name][:50], dense[name][kept["2/units"].long()])
    assert STRUCTURES in hashes(small.folder)


def test_padding_goes_to_a_number_of_heads_that_transformers_takes(tmp_path: Path, ids: Tensor) -> None:
    """Six heads do not divide a Llama's hidden width of 32, but a Mistral is not asked."""
    for family, groups in (("llama", 4), ("mistral", 3)):
        architecture, config = tiny.FAMILIES[family]
        shape = config | {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
        model = tiny.build(architecture, shape)
        model.save_pretrained(tmp_path / family / "source")  # type: ignore[operator]
        tiny.tokenizer().save_pretrained(tmp_path / family / "source")
        import_model(tmp_path / family / "source", tmp_path / family / "in", "source", {})
        small, shrunk = cut(Checkpoint(tmp_path / family / "in"), tmp_path / family, {"heads": [2, 3, 1]})
        assert shrunk.widths == {"heads": groups}
        assert shrunk.padding == 32 * (16 + 8 + 8 + 16) * (3 * groups - 6)
        expected = whole_logits(tmp_path / family / "masked", ids)
        torch.testing.assert_close(whole_logits(small.folder, ids), expected, rtol=1e-5, atol=1e-5)


def test_structures_that_are_not_named_stay(imported: Make, tmp_path: Path, ids: Tensor) -> None:
    source = Checkpoint(imported("llama"))
    structures = find_structures(source, ["units"])
    writer = CheckpointWriter(tmp_path / "small", source.folder)
    shrunk = shrink(source, writer, structures, {}, {"units": [64]})
    writer.finish(source.depth, lineage(source) | {"layers": shrunk.layers}, shrunk.config)
    assert (shrunk.padding, shrunk.layers) == (0, source.layers)
    assert torch.equal(whole_logits(tmp_path / "small", ids), whole_logits(source.folder, ids))
    assert all(mask.all() for mask in all_masks(Checkpoint(tmp_path / "small")).values())


def test_mask_within_what_stays_is_cut_with_it(pruned: Checkpoint, tmp_path: Path, ids: Tensor) -> None:
    """Structures of a model that was pruned weight by weight before: masks of both kinds come together."""
    structures = find_structures(pruned, ["units"])
    kept = drawn(structures, {"units": [48] * 3})
    writer = CheckpointWriter(tmp_path / "small", pruned.folder)
    shrunk = shrink(pruned, writer, structures, kept, {"units": [48, 64]})
    writer.finish(pruned.depth, lineage(pruned) | {"layers": shrunk.layers}, shrunk.config)
    before, after = all_masks(pruned), all_masks(Checkpoint(tmp_path / "small"))
    up, down = "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"
    assert torch.equal(after[up], before[up][kept[1, "units"]])
    assert torch.equal(after[down], before[down][:, kept[1, "units"]])
    assert torch.equal(after["model.layers.1.self_attn.q_proj"], before["model.layers.1.self_attn.q_proj"])


def test_weights_on_a_grid_are_refused(quantized: Checkpoint, tmp_path: Path) -> None:
    structures = find_structures(quantized, ["units"])
    with pytest.raises(Problem, match=r"lie on a grid(.|\n)*prune before quantising"):
        shrink(quantized, CheckpointWriter(tmp_path / "small", quantized.folder), structures, {}, {"units": [64]})


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A llama in bfloat16, 2 of 4 key/value heads left, 32 of 64 units, a block padded. Not to be changed."""
    folder = tmp_path_factory.mktemp("shrunk")
    architecture, config = tiny.FAMILIES["llama"]
    model = tiny.build(architecture, config | {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16})
    tiny.teach(model, 40)
    model.save_pretrained(folder / "source")  # type: ignore[operator]
    byte_level().save_pretrained(folder / "source")
    import_model(folder / "source", folder / "dense", "bfloat16", {"licence": "none"})
    return cut(Checkpoint(folder / "dense"), folder, {"units": [32, 24, 32], "heads": [2, 2, 2]})[0]


@torch.no_grad()
def test_it_is_quantised(small: Checkpoint, tmp_path: Path, ids: Tensor) -> None:
    packed = quantize(small, tmp_path / "packed")
    loaded: Any = whole_model(packed.folder, torch.bfloat16)
    loaded(input_ids=ids)  # codes become weights when they are first needed
    weights = {name: tensor for index in range(3) for name, tensor in block_reader(packed)(index).items()}
    for layer, mask in all_masks(packed).items():
        weight = loaded.get_submodule(layer).weight
        assert list(weight.shape) == small.layers[layer]
        assert torch.equal(weight, weights[f"{layer}.weight"])
        assert revived(weight, mask) == 0
    assert measure_size(packed)["sparsity"] == measure_size(small)["sparsity"] > 0
    assert vllm_faults(packed.config()["quantization_config"]) == []


def test_it_is_exported(small: Checkpoint, tmp_path: Path, ids: Tensor) -> None:
    for name, checkpoint in (("plain", small), ("packed", quantize(small, tmp_path / "checkpoint"))):
        gguf.write(checkpoint, tmp_path / name)
        with torch.no_grad():
            logits = read_back(tmp_path / name, checkpoint)(input_ids=ids).logits
        assert torch.equal(logits, whole_logits(checkpoint.folder, ids, torch.bfloat16))
        compact.write(checkpoint, tmp_path / f"{name}-compact")
        again = compact.restore(tmp_path / f"{name}-compact", tmp_path / f"{name}-again")
        assert hashes(again.folder) == hashes(checkpoint.folder)


def test_it_is_retrained_with_the_dense_model_as_its_teacher(small: Checkpoint, tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "out", small.folder)
    options: dict[str, Any] = {
        "targets": [], "rank": 4, "alpha": 8.0, "biases": True, "norms": True, "head": False, "embeddings": False,
        "start": "broken", "seed": 3, "checkpointing": False, "distillation": 0.5, "held_out": 0, "check_every": 5,
        "patience": 3, "search": [], "search_steps": 0,
    }  # fmt: skip
    recipe = Recipe(steps=20, learning_rate=5e-3, warmup=0.1, clip=1.0)
    text = tiny.encode(tiny.sentences(1, 60))
    dense = Checkpoint(small.folder.with_name("dense"))
    method = import_module(METHODS["mask_lora"])
    told = retrain_model(
        small, dense, writer, journal(tmp_path / "out"), method, options, recipe, text, 4, CPU, torch.float32
    )
    writer.finish(small.depth, lineage(small))
    retrained = Checkpoint(tmp_path / "out")
    assert told["losses"][-1] < told["losses"][0]
    assert retrained.layers == small.layers
    before, after = all_masks(small), all_masks(retrained)
    assert all(torch.equal(after[layer], mask) for layer, mask in before.items())
    assert measure_size(retrained)["revived_weights"] == 0
    assert whole_model(retrained.folder).config.num_attention_heads == 4  # type: ignore[union-attr]
