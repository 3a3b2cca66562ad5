"""What is packed comes back, is what transformers computes with, and costs the bytes that its bits say."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from compression.core.checkpoint import OUTER, Checkpoint, CheckpointWriter
from compression.core.errors import Problem
from compression.evaluation.size import measure_size
from compression.importing import import_model
from compression.quantization.grid import Grid, GroupSize, ends, fit_grid
from compression.quantization.packed import Layout, block_reader, pack, plain_outer, plain_weights, unpack
from compression.quantization.scheme import (
    Anatomy,
    Scheme,
    anatomy,
    config_entry,
    from_manifest,
    layouts,
    pack_outer,
    to_manifest,
)
from tests import tiny
from tests.compression.helpers import all_tensors, lineage, walked_logits, whole_logits
from tests.conftest import Make
from tests.reference import packing as reference

WIDTHS = range(2, 9)
SIZES: list[GroupSize] = [16, "row", "tensor"]

every_width = pytest.mark.parametrize("bits", WIDTHS)
every_size = pytest.mark.parametrize("group_size", SIZES)
every_symmetry = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])


def example(rows: int = 6, width: int = 48) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(1)) + 0.3


def same(one: Grid, other: Grid) -> bool:
    zeros = one.zero is other.zero or (
        one.zero is not None and other.zero is not None and torch.equal(one.zero, other.zero)
    )
    return one.bits == other.bits and torch.equal(one.scale, other.scale) and zeros


def store(source: Checkpoint, target: Path, schemes: Mapping[str, Scheme], packed: bool) -> Checkpoint:
    """`source` rounded to nearest: as codes with their config, or as the plain weights that these stand for."""
    model, writer = anatomy(source.folder), CheckpointWriter(target, source.folder)
    kinds = layouts(schemes, model)

    def on_grids(tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Grid]]:
        found = {}
        for layer, scheme in schemes.items():
            if (weight := tensors.get(f"{layer}.weight")) is not None:
                grid = fit_grid(weight, scheme.bits, scheme.group_size, scheme.symmetric)
                found[layer] = grid.codes(weight), grid
        return found

    def values(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors | {f"{layer}.weight": grid.values(codes) for layer, (codes, grid) in on_grids(tensors).items()}

    outer = source.outer()
    writer.write_outer(pack_outer(outer, on_grids(outer), kinds, model) if packed else values(outer))
    for index in range(source.depth):
        tensors = source.block(index)
        if packed:
            for layer, (codes, grid) in on_grids(tensors).items():
                del tensors[f"{layer}.weight"]
                tensors |= pack(layer, codes, grid, kinds[layer])
        writer.write_block(index, tensors if packed else values(tensors))
    if packed:
        config = source.config() | {"quantization_config": config_entry(schemes, model)}
        writer.finish(source.depth, lineage(source) | {"quantization": to_manifest(schemes)}, config)
    else:
        writer.finish(source.depth, lineage(source))
    return Checkpoint(target)


def loads_as_it_is(source: Checkpoint, folder: Path, schemes: Mapping[str, Scheme], ids: Tensor) -> Checkpoint:
    """Proves that transformers computes the very logits of the rounded weights, and that we do too."""
    packed, plain = (store(source, folder / name, schemes, name == "packed") for name in ("packed", "plain"))
    logits = whole_logits(packed.folder, ids)
    assert torch.equal(logits, whole_logits(plain.folder, ids))
    assert not torch.equal(logits, whole_logits(source.folder, ids))
    torch.testing.assert_close(walked_logits(packed.folder, ids), logits, rtol=1e-4, atol=1e-4)
    return packed


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_round_trip(data: st.DataObject) -> None:
    """Every width, odd shapes, words that a code straddles."""
    bits, symmetric = data.draw(st.sampled_from(WIDTHS)), data.draw(st.booleans())
    layout: Layout = data.draw(st.sampled_from(["packed", "loose", "bytes"]))
    rows, groups, size = data.draw(st.integers(2, 40)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 37))
    whole = data.draw(st.booleans())
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    low, high = ends(bits)
    codes = torch.randint(low, high + 1, (rows, groups * size), dtype=torch.int8, generator=draw)
    shape = (1, 1) if whole else (rows, groups)
    zero = None if symmetric else torch.randint(low, high + 1, shape, dtype=torch.int8, generator=draw)
    grid = Grid(bits, torch.rand(shape, generator=draw) + 0.1, zero)
    tensors = pack("a.b", codes, grid, layout)
    again, same_grid = unpack("a.b", tensors, bits)
    assert again.dtype == torch.int8
    assert torch.equal(again, codes)
    assert same(same_grid, grid)
    if layout != "bytes":
        assert tensors["a.b.weight_packed"].shape == (rows, -(-groups * size * bits // 32))  # no bit wasted


@every_width
def test_words_are_those_of_the_twin(bits: int) -> None:
    low, high = ends(bits)
    codes = torch.randint(low, high + 1, (3, 41), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    zero = codes[:, :2].contiguous()
    tensors = pack("a", codes, Grid(bits, torch.ones(3, 2), zero))
    assert tensors["a.weight_packed"].tolist() == reference.words(codes, bits)
    assert tensors["a.weight_zero_point"].T.tolist() == reference.words(zero.T, bits)


def test_plain_weights_touches_packed_layers_only() -> None:
    grid = fit_grid(example(), 4, 16)
    codes = grid.codes(example())
    others = {"a.bias": torch.ones(6), "norm.weight": torch.ones(3), "c.weight": torch.ones(2, 2)}
    plain = plain_weights(pack("a", codes, grid) | others, {"a": 4})
    assert set(plain) == {"a.weight", *others}
    assert torch.equal(plain["a.weight"], grid.values(codes))
    assert all(torch.equal(plain[name], tensor) for name, tensor in others.items())


@every_symmetry
@pytest.mark.parametrize(("bits", "group_size"), [*((bits, 16) for bits in WIDTHS), (3, "row"), (5, "tensor")])
def test_one_scheme_loads(
    bits: int, group_size: GroupSize, symmetric: bool, imported: Make, tmp_path: Path, ids: Tensor
) -> None:
    source = Checkpoint(imported("llama"))
    loads_as_it_is(source, tmp_path, dict.fromkeys(source.layers, Scheme(bits, group_size, symmetric)), ids[:1])


def mixed(source: Checkpoint, symmetric: bool = True) -> dict[str, Scheme]:
    """A scheme of its own for each block, one linear left as it is."""
    kinds = [Scheme(3, 16, symmetric), Scheme(4, 32, symmetric), Scheme(6, "tensor", symmetric)]
    left = f"{source.blocks}.1.mlp.down_proj"
    return {
        layer: kinds[next(index for index in range(3) if layer.startswith(f"{source.blocks}.{index}."))]
        for layer in source.layers
        if layer != left
    }


@every_symmetry
def test_many_schemes_load(symmetric: bool, imported: Make, tmp_path: Path, ids: Tensor) -> None:
    source = Checkpoint(imported("llama"))
    packed = loads_as_it_is(source, tmp_path, mixed(source, symmetric), ids)
    entry = packed.config()["quantization_config"]
    assert len(entry["config_groups"]) == 3
    assert entry["ignore"] == ["model.layers.1.mlp.down_proj", "lm_head"]


def saved(source: Checkpoint, packed: Checkpoint) -> float:
    """The share of the embedding's bytes, and of a head's that is not tied, that the file outside the blocks saves."""
    model, outer = anatomy(source.folder), source.outer()
    tables = sum(outer[f"{name}.weight"].nbytes for name in (model.embedding, model.head) if f"{name}.weight" in outer)
    before, after = ((checkpoint.folder / OUTER).stat().st_size for checkpoint in (source, packed))
    return (before - after) / tables


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "gemma3", "gpt_neox"])
def test_embedding_of_the_same_scheme_loads(family: str, imported: Make, tmp_path: Path, ids: Tensor) -> None:
    """And with it the head, stored once if it is tied."""
    source = Checkpoint(imported(family))
    model = anatomy(source.folder)
    layers = [*source.layers, model.embedding, *([] if model.tied or model.head is None else [model.head])]
    packed = loads_as_it_is(source, tmp_path, dict.fromkeys(layers, Scheme(4, 16, symmetric=False)), ids)
    assert saved(source, packed) > 0.6
    assert f"{model.head}.weight" not in all_tensors(packed)
    assert measure_size(packed)["parameters"] == measure_size(source)["parameters"]


@every_symmetry
@every_size
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_embedding_of_8_bits_among_other_schemes_loads(
    family: str, group_size: GroupSize, symmetric: bool, imported: Make, tmp_path: Path, ids: Tensor
) -> None:
    source = Checkpoint(imported(family))
    model = anatomy(source.folder)
    assert model.tied == (family == "qwen2")
    schemes = mixed(source) | {model.embedding: Scheme(8, group_size, symmetric)}
    if not model.tied and model.head:
        schemes[model.head] = Scheme(5, 32)
    packed = loads_as_it_is(source, tmp_path, schemes, ids)
    assert saved(source, packed) > 0.5
    assert set(plain_outer(packed)) == set(source.outer())
    assert measure_size(packed)["parameters"] == measure_size(source)["parameters"]


@every_symmetry
def test_bfloat16_values_are_read_alike(symmetric: bool, original: Make, tmp_path: Path, ids: Tensor) -> None:
    """The scale is stored in bfloat16: our values have to be those that transformers unpacks, to the bit."""
    import_model(original("llama"), tmp_path / "half", "bfloat16", {})
    source = Checkpoint(tmp_path / "half")
    packed = store(source, tmp_path / "packed", mixed(source, symmetric), packed=True)
    model = AutoModelForCausalLM.from_pretrained(packed.folder, dtype=torch.bfloat16)
    model(input_ids=ids[:1, :2])  # the first pass unpacks
    plain = {name: t for index in range(packed.depth) for name, t in block_reader(packed)(index).items()}
    for layer in packed.layers:
        assert torch.equal(model.get_parameter(f"{layer}.weight"), plain[f"{layer}.weight"])


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_anatomy(family: str, imported: Make) -> None:
    source = Checkpoint(imported(family))
    model, outer = anatomy(source.folder), source.outer()
    assert f"{model.embedding}.weight" in outer
    assert (f"{model.head}.weight" in outer) == (not model.tied)
    assert set(source.layers) <= set(model.linears)
    assert model.head in model.linears


LLAMA = Anatomy("embed", "head", False, ("a", "b", "head"))
TIED = Anatomy("embed", "head", True, ("a", "b", "head"))


def test_what_does_not_load_is_refused() -> None:
    with pytest.raises(Problem, match=r"embed: .*embedding of 4 bits among layers of other schemes\n.*8 bits"):
        layouts({"a": Scheme(3, 16), "embed": Scheme(4, 16)}, LLAMA)
    with pytest.raises(Problem, match=r"a: .*asymmetric rows"):
        layouts({"a": Scheme(3, "row", False), "b": Scheme(4, 16)}, LLAMA)
    with pytest.raises(Problem, match=r"head: computes with the embedding's weight\n.*embed"):
        layouts({"a": Scheme(4, 16), "head": Scheme(4, 16)}, TIED)


def test_entry_is_what_compressed_tensors_parses() -> None:
    schemes = {"a": Scheme(4, 16, False), "b": Scheme(3, "row"), "embed": Scheme(8, "tensor")}
    entry = json.loads(json.dumps(config_entry(schemes, TIED)))
    groups = QuantizationConfig.model_validate(entry).config_groups.values()
    found = {target: (group.weights.num_bits, group.weights.symmetric) for group in groups for target in group.targets}
    assert found == {"a": (4, False), "b": (3, True), "embed": (8, True), "head": (8, True)}
    assert entry["ignore"] == []


def test_manifest_tells_schemes_bits_and_size() -> None:
    schemes = {"a": Scheme(4, 16, False), "b": Scheme(3, "row"), "c": Scheme(8, "tensor")}
    entry = json.loads(json.dumps({"quantization": to_manifest(schemes)}))
    assert from_manifest(entry) == schemes
    assert entry["quantization"]["bits"] == {"a": 4, "b": 3, "c": 8}
    assert entry["quantization"]["group_size"] is None
    assert to_manifest({"a": Scheme(4, 16), "b": Scheme(3, 16)})["group_size"] == 16
    assert from_manifest({"quantization": {"group_size": 64, "bits": {"a": 4}}}) == {"a": Scheme(4, 64)}
    assert from_manifest({}) == {}
