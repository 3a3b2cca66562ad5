"""A checkpoint as a GGUF file: others read the very same weights, tokens and logits out of it."""

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import gguf as outside
import numpy as np
import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from compression.core.adapter import write_adapter
from compression.core.checkpoint import OUTER, Checkpoint, CheckpointWriter, block_file
from compression.core.errors import Problem
from compression.export import gguf
from compression.export.gguf_blocks import on_grid
from compression.importing import import_model
from compression.pruning import wanda
from compression.pruning.pattern import Unstructured
from compression.quantization.grid import Grid, GroupSize, fit_grid
from compression.quantization.method import Settings as GridSettings
from compression.quantization.packed import Layout, block_reader, pack
from tests import tiny
from tests.compression import helpers
from tests.conftest import Make

TEMPLATE = "{% for message in messages %}{{ message['content'] }}<|end|>{% endfor %}"
TEXTS = ["the old captain watched a distant ship.", "In 1998  42 gulls,\n\n\tdon't ask: wörld 你好 <|end|><think>!"]

Export = Callable[[str], Checkpoint]


def byte_level(size: int = 96) -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE with a special token, an ordinary added one and a chat template; `size` with all of them."""
    letters = Tokenizer(models.BPE())
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet() if size > 256 else []
    trainer = trainers.BpeTrainer(
        vocab_size=size - 1, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    letters.train_from_iterator([tiny.sentences(1, 200), tiny.story(1, 100)], trainer)
    letters.add_tokens(["<think>"])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=letters, bos_token="<|end|>", eos_token="<|end|>", pad_token="<|end|>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory, original: Make) -> Export:
    """family -> a tiny model in bfloat16, with a tokenizer that GGUF knows. Not to be changed."""

    @cache
    def make(family: str) -> Checkpoint:
        folder = tmp_path_factory.mktemp("dense")
        shutil.copytree(original(family), folder / "source")
        byte_level().save_pretrained(folder / "source")
        import_model(folder / "source", folder / family, "bfloat16", {"licence": "none"})
        return Checkpoint(folder / family)

    return make


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, dense: Export, ids: Tensor) -> Export:
    """family -> half pruned, on 4 bits, its first block on 8. Not to be changed."""

    @cache
    def make(family: str) -> Checkpoint:
        folder = tmp_path_factory.mktemp("packed")
        pruned = helpers.prune(dense(family).folder, folder / "pruned", wanda, Unstructured(0.5), ids)
        return helpers.quantize(pruned, folder / family)

    return make


def weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Every tensor as a plain weight."""
    tensors = checkpoint.outer()
    for index in range(checkpoint.depth):
        tensors |= block_reader(checkpoint)(index)
    return tensors


def fields(folder: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in outside.GGUFReader(folder / gguf.FILE).fields.items()}


def values(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of the file as the package that llama.cpp publishes reads it."""
    return {
        tensor.name: outside.quants.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
        for tensor in outside.GGUFReader(folder / gguf.FILE).tensors
    }


def read_back(folder: Path, checkpoint: Checkpoint) -> Any:
    """The model as transformers reads it out of the file."""
    # transformers does not look for the width of Qwen 3's heads in the file.
    own = {"head_dim": 8} if "Qwen3ForCausalLM" in checkpoint.config()["architectures"] else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf.FILE, dtype=torch.bfloat16, **own)
    return model.eval()


@pytest.mark.parametrize(
    ("family", "state"),
    [("llama", "dense"), ("llama", "packed"), ("mistral", "dense"), ("qwen2", "packed"), ("qwen3", "packed")],
)
def test_transformers_reads_the_same_model(
    family: str, state: str, request: pytest.FixtureRequest, ids: Tensor, tmp_path: Path
) -> None:
    checkpoint = request.getfixturevalue(state)(family)
    gguf.write(checkpoint, tmp_path)
    told = fields(tmp_path)
    ids = ids[:, : told[f"{told['general.architecture']}.context_length"]]
    with torch.no_grad():
        logits = read_back(tmp_path, checkpoint)(input_ids=ids).logits
    assert torch.equal(logits, helpers.whole_logits(checkpoint.folder, ids, torch.bfloat16))


def test_our_own_import_gives_the_same_weights(packed: Export, tmp_path: Path) -> None:
    gguf.write(packed("llama"), tmp_path)
    import_model(tmp_path / gguf.FILE, tmp_path / "out", "bfloat16", {})
    ours, theirs = weights(packed("llama")), weights(Checkpoint(tmp_path / "out"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert Checkpoint(tmp_path / "out").layers == packed("llama").layers


def test_zero_points_and_zeros_are_kept(dense: Export, ids: Tensor, tmp_path: Path) -> None:
    pruned = helpers.prune(dense("llama").folder, tmp_path / "pruned", wanda, Unstructured(0.5), ids)
    checkpoint = helpers.quantize(pruned, tmp_path / "in", settings=GridSettings(32, symmetric=False), first=5)
    figures = gguf.write(checkpoint, tmp_path)
    assert figures["types"] == {"BF16": 2, "F32": 7, "Q5_0": 14, "Q8_0": 7}
    import_model(tmp_path / gguf.FILE, tmp_path / "out", "bfloat16", {})
    ours, theirs = weights(checkpoint), weights(Checkpoint(tmp_path / "out"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for layer, mask in helpers.all_masks(checkpoint).items():
        assert not theirs[f"{layer}.weight"][~mask].any()


@pytest.mark.parametrize("layout", ["packed", "bytes"])
def test_embedding_on_a_grid(layout: Layout, dense: Export, tmp_path: Path) -> None:
    source = dense("qwen2")
    outer = source.outer()
    weight = outer.pop("model.embed_tokens.weight")
    grid = fit_grid(weight, 8, 32)
    codes = grid.codes(weight)
    writer = CheckpointWriter(tmp_path / "in", source.folder)
    writer.write_outer(outer | pack("model.embed_tokens", codes, grid, layout))
    for index in range(source.depth):
        writer.link(source, block_file(index))
    writer.finish(source.depth, helpers.lineage(source) | {"quantization": {"bits": {"model.embed_tokens": 8}}})
    figures = gguf.write(Checkpoint(tmp_path / "in"), tmp_path)
    assert figures["types"]["Q8_0"] == 1
    assert np.array_equal(values(tmp_path)["token_embd.weight"], exact(codes, grid).float().numpy())


def test_figures_are_those_of_the_file(packed: Export, tmp_path: Path) -> None:
    figures = gguf.write(packed("llama"), tmp_path / "new")
    assert figures["bytes"] == (tmp_path / "new" / figures["file"]).stat().st_size
    assert figures["types"] == {"BF16": 2, "F32": 7, "Q4_0": 14, "Q8_0": 7}
    assert (figures["rounding"], figures["widened"]) == (0.0, {})
    assert [file.name for file in (tmp_path / "new").iterdir()] == [gguf.FILE]
    assert fields(tmp_path / "new")["general.file_type"] == outside.LlamaFileType.MOSTLY_Q4_0


def test_equal_checkpoints_give_equal_bytes(packed: Export, tmp_path: Path) -> None:
    for name in ("one", "two"):
        gguf.write(packed("llama"), tmp_path / name)
    assert (tmp_path / "one" / gguf.FILE).read_bytes() == (tmp_path / "two" / gguf.FILE).read_bytes()


@pytest.mark.parametrize("stored", ["float16", "float32"])
def test_full_precision_is_kept_as_it_is(stored: str, dense: Export, tmp_path: Path) -> None:
    import_model(dense("llama").folder, tmp_path / "in", stored, {})
    figures = gguf.write(Checkpoint(tmp_path / "in"), tmp_path)
    assert figures["types"] == ({"F16": 23, "F32": 7} if stored == "float16" else {"F32": 30})
    own = weights(Checkpoint(tmp_path / "in"))
    for name, other in (("token_embd", "model.embed_tokens"), ("blk.1.ffn_down", "model.layers.1.mlp.down_proj")):
        assert np.array_equal(values(tmp_path)[f"{name}.weight"], own[f"{other}.weight"].float().numpy())


def random_grid(bits: int, group_size: GroupSize, symmetric: bool) -> tuple[Tensor, Grid]:
    """Codes of normal weights [6, 128], shifted so that zero points matter, and their grid in bfloat16."""
    draw = torch.Generator().manual_seed(bits)
    weight = torch.randn(6, 128, generator=draw) * torch.rand(6, 1, generator=draw) / 10
    weight = (weight + (0 if symmetric else 0.05)).bfloat16()
    grid = fit_grid(weight, bits, group_size, symmetric)
    return grid.codes(weight), grid


def exact(codes: Tensor, grid: Grid) -> Tensor:
    """s (q - z), float64."""
    spread = codes.shape[1] // grid.scale.shape[1]
    zero = 0 if grid.zero is None else grid.zero.double().repeat_interleave(spread, dim=1)
    return grid.scale.double().repeat_interleave(spread, dim=1) * (codes.double() - zero)


def decoded(codes: Tensor, grid: Grid, dense: bool = False) -> tuple[str, Tensor]:
    layout, encode = on_grid(codes, grid, dense)
    assert encode().nbytes == layout.nbytes
    return layout.type.name, torch.from_numpy(outside.quants.dequantize(encode(), layout.type)).double()


@pytest.mark.parametrize("group_size", [32, 64, "row", "tensor"])
@pytest.mark.parametrize(
    ("bits", "symmetric", "expected"),
    [
        (2, True, "Q4_0"), (3, True, "Q4_0"), (4, True, "Q4_0"), (5, True, "Q5_0"), (6, True, "Q8_0"),
        (7, True, "Q8_0"), (8, True, "Q8_0"), (2, False, "Q4_0"), (3, False, "Q4_0"), (4, False, "Q5_0"),
        (5, False, "Q8_0"), (7, False, "Q8_0"),
    ],
)  # fmt: skip
def test_values_are_those_of_the_grid(bits: int, symmetric: bool, expected: str, group_size: GroupSize) -> None:
    codes, grid = random_grid(bits, group_size, symmetric)
    kind, read = decoded(codes, grid)
    assert kind == expected
    assert torch.equal(read, exact(codes, grid).expand_as(read))
    assert torch.equal(read == 0, grid.zeros(codes))


def test_every_code_is_itself() -> None:
    """Lowest and highest codes and zero points, which random weights do not always reach."""
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(16, 8)
    zero = torch.arange(-8, 8, dtype=torch.int8).view(16, 1)
    grid = Grid(4, torch.full((16, 1), 0.25, dtype=torch.bfloat16), zero)
    for dense, kind in ((False, "Q5_0"), (True, "Q4_1")):
        assert decoded(codes, grid, dense)[0] == kind
        assert torch.equal(decoded(codes, grid, dense)[1], exact(codes, grid))
    wide = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8).view(2, 128)
    assert torch.equal(decoded(wide, Grid(8, grid.scale[:2]))[1], 0.25 * wide.double())


def test_offset_of_a_dense_layer_is_rounded_by_no_more_than_is_told() -> None:
    """15 * 255 / 128 has twelve bits, of which float16 holds eleven."""
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(2, 4)
    zero = torch.tensor([[7, 7], [-1, 0]], dtype=torch.int8)
    grid = Grid(4, torch.full((2, 2), 255 / 128, dtype=torch.bfloat16), zero)
    layout, _ = on_grid(codes, grid, dense=True)
    kind, read = decoded(codes, grid, dense=True)
    off = (read - exact(codes, grid)).abs() * 128 / 255
    assert kind == "Q4_1"
    assert off.max().item() == pytest.approx(layout.rounding) == pytest.approx(1 / 255)
    assert off[1].max() == 0


@pytest.mark.parametrize(
    ("scale", "zero", "bits", "group_size", "why"),
    [
        (torch.full((4, 4), 0.25), None, 4, 16, "groups of 16 inputs"),
        (torch.full((4, 2), 0.1), None, 4, 32, "scales that float16 does not hold"),
        (torch.full((4, 2), 2.0**-30), None, 4, 32, "scales that float16 does not hold"),
        (torch.full((4, 2), 2.0**17), None, 8, 32, "scales that float16 does not hold"),
        (torch.full((4, 2), 0.25), torch.full((4, 2), -100, dtype=torch.int8), 8, 32, "8 bits and a zero point"),
    ],
)
def test_what_no_type_holds_is_stored_in_full_precision_and_told(
    scale: Tensor, zero: Tensor | None, bits: int, group_size: int, why: str
) -> None:
    codes = torch.randint(-8, 8, (4, 64), dtype=torch.int8)
    grid = Grid(bits, scale, zero)
    layout, encode = on_grid(codes, grid, dense=True)
    assert why in layout.widened
    assert torch.equal(torch.from_numpy(encode()).view(torch.float32).reshape(4, 64), grid.values(codes))


def test_widened_layers_are_named(dense: Export, tmp_path: Path) -> None:
    figures = gguf.write(helpers.quantize(dense("llama"), tmp_path / "fine", group_size=16), tmp_path)
    assert len(figures["widened"]) == 21
    assert figures["widened"]["blk.0.attn_q.weight"].startswith("groups of 16 inputs")


def test_moved_rows_meet_the_same_rows_after_the_other_rotation() -> None:
    """Scores q.k do not change: halves rotated against each other, or neighbours, by the same angles."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k = torch.randn(2, 3, 8, dtype=torch.float64)  # a head of 8 at three positions
    angles = torch.randn(3, 4, dtype=torch.float64)
    cos, sin = (f(torch.cat([angles, angles], dim=-1))[None] for f in (torch.cos, torch.sin))
    left, right = apply_rotary_pos_emb(q[None, None], k[None, None], cos, sin)
    order = gguf._neighbours(8, 1)

    def turned(rows: Tensor) -> Tensor:
        pairs = torch.view_as_complex(rows[:, order].reshape(3, 4, 2).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(1)

    torch.testing.assert_close(turned(q) @ turned(k).T, (left @ right.transpose(-1, -2))[0, 0])


def test_biases_move_with_their_rows(tmp_path: Path) -> None:
    model: Any = tiny.build("LlamaForCausalLM", tiny.FAMILIES["llama"][1] | {"attention_bias": True})
    with torch.no_grad():
        for layer in (model.model.layers[0].self_attn.q_proj, model.model.layers[0].self_attn.k_proj):
            layer.bias.copy_(layer.weight[:, 5])
    model.save_pretrained(tmp_path / "source")
    byte_level().save_pretrained(tmp_path / "source")
    import_model(tmp_path / "source", tmp_path / "in", "bfloat16", {})
    gguf.write(Checkpoint(tmp_path / "in"), tmp_path)
    for name in ("attn_q", "attn_k"):
        read = values(tmp_path)
        assert np.array_equal(read[f"blk.0.{name}.bias"], read[f"blk.0.{name}.weight"][:, 5])


def test_metadata_describe_the_model(dense: Export, tmp_path: Path) -> None:
    gguf.write(dense("qwen3"), tmp_path)
    told = fields(tmp_path)
    assert told["general.architecture"] == "qwen3"
    assert {key: told[f"qwen3.{key}"] for key in ("block_count", "embedding_length", "feed_forward_length")} == {
        "block_count": 3,
        "embedding_length": 32,
        "feed_forward_length": 64,
    }
    assert (told["qwen3.attention.head_count"], told["qwen3.attention.head_count_kv"]) == (4, 2)
    assert (told["qwen3.attention.key_length"], told["qwen3.attention.value_length"]) == (8, 8)
    assert told["qwen3.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    assert (told["qwen3.vocab_size"], told["qwen3.context_length"]) == (96, 128)
    assert "output.weight" not in values(tmp_path)  # tied


def test_context_ends_where_a_sliding_window_would_begin_to_slide(dense: Export, tmp_path: Path) -> None:
    gguf.write(dense("mistral"), tmp_path)
    assert fields(tmp_path)["llama.context_length"] == 16


def edited(dense: Export, folder: Path, changes: dict[str, Any]) -> Checkpoint:
    """A llama whose config.json says something else."""
    shutil.copytree(dense("llama").folder, folder)
    config = Checkpoint(folder).config() | changes
    (folder / "config.json").write_text(json.dumps(config))
    return Checkpoint(folder)


def test_linear_rope_is_told(dense: Export, tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}
    gguf.write(edited(dense, tmp_path / "in", {"rope_parameters": rope}), tmp_path)
    told = fields(tmp_path)
    assert (told["llama.rope.freq_base"], told["llama.rope.dimension_count"]) == (5000.0, 8)
    assert (told["llama.rope.scaling.type"], told["llama.rope.scaling.factor"]) == ("linear", 4.0)


def test_llama_3_rope_is_a_tensor(dense: Export, tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    checkpoint = edited(dense, tmp_path / "in", {"rope_parameters": rope})
    gguf.write(checkpoint, tmp_path)
    own: Any = helpers.whole_model(checkpoint.folder)
    plain = 10000.0 ** -(torch.arange(0, 8, 2) / 8)
    factors = torch.tensor(values(tmp_path)["rope_freqs.weight"])
    assert factors.min() == 1 < factors.max()
    torch.testing.assert_close(plain / factors, own.model.rotary_emb.inv_freq)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, r"GemmaForCausalLM is not written as GGUF\n.*LlamaForCausalLM, Mis"),
        ({"hidden_act": "gelu"}, r"config\.json: activation gelu is not written as GGUF\n.*silu"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            r"rope_type dynamic is not written as GGUF\n.*default, linear, llama3",
        ),
    ],
)
def test_what_is_not_supported_is_named(changes: dict[str, Any], message: str, dense: Export, tmp_path: Path) -> None:
    with pytest.raises(Problem, match=message):
        gguf.write(edited(dense, tmp_path / "in", changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_adapter_is_refused(dense: Export, tmp_path: Path) -> None:
    source = dense("llama")
    writer = CheckpointWriter(tmp_path / "in", source.folder)
    for name in (OUTER, *(block_file(index) for index in range(source.depth))):
        writer.link(source, name)
    layer = next(iter(source.layers))
    write_adapter(tmp_path / "in", {layer: (torch.ones(2, 32), torch.ones(32, 2))}, {"r": 2, "lora_alpha": 2})
    writer.finish(source.depth, helpers.lineage(source))
    with pytest.raises(Problem, match="an adapter lies beside the weights"):
        gguf.write(Checkpoint(tmp_path / "in"), tmp_path / "out")


def test_tokenizer_comes_along(dense: Export, tmp_path: Path) -> None:
    """All bytes, so that any text has tokens; a special token and an added one inside the text."""
    checkpoint = edited(dense, tmp_path / "in", {"vocab_size": 400})
    own = byte_level(380)
    own.save_pretrained(checkpoint.folder)
    writer = outside.GGUFWriter(tmp_path / gguf.FILE, "llama")
    gguf.add_tokenizer(writer, checkpoint.folder, 400)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    read = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=gguf.FILE)
    for text in TEXTS:
        assert read(text).input_ids == own(text).input_ids
        assert read.decode(read(text).input_ids) == text
    assert (read.bos_token, read.eos_token, read.pad_token) == ("<|end|>",) * 3
    assert read.chat_template == TEMPLATE
    told = fields(tmp_path)
    assert (told["tokenizer.ggml.model"], told["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    kinds = told["tokenizer.ggml.token_type"]
    assert kinds[own.convert_tokens_to_ids("<|end|>")] == outside.TokenType.CONTROL
    assert kinds[own.convert_tokens_to_ids("<think>")] == outside.TokenType.USER_DEFINED
    assert kinds[380:] == [outside.TokenType.UNUSED] * 20
    assert told["tokenizer.ggml.add_bos_token"] is False


def test_a_beginning_that_the_tokenizer_adds_is_told(dense: Export, tmp_path: Path) -> None:
    checkpoint = edited(dense, tmp_path / "in", {})
    own = byte_level()
    own.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", 0)]
    )
    own.save_pretrained(checkpoint.folder)
    gguf.write(checkpoint, tmp_path)
    told = fields(tmp_path)
    assert told["tokenizer.ggml.add_bos_token"] is True
    assert told["tokenizer.ggml.add_eos_token"] is False


def split(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )


@pytest.mark.parametrize(
    ("pre", "name"),
    [
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)]), "smollm"),
        (split(GGUF_PRE_TOKENIZER_SPLITS["llama-bpe"]), "llama3"),
        (split(GGUF_PRE_TOKENIZER_SPLITS["qwen2"]), "qwen2"),
        (split(GGUF_PRE_TOKENIZER_SPLITS["tekken"]), "tekken"),
    ],
)
def test_the_way_to_split_text_is_named(pre: Any, name: str, dense: Export, tmp_path: Path) -> None:
    checkpoint = edited(dense, tmp_path / "in", {})
    own = byte_level()
    own.backend_tokenizer.pre_tokenizer = pre
    own.save_pretrained(checkpoint.folder)
    gguf.write(checkpoint, tmp_path)
    assert fields(tmp_path)["tokenizer.ggml.pre"] == name


def test_the_way_to_split_text_comes_through_an_import(dense: Export, tmp_path: Path) -> None:
    """Out of one GGUF file and into the next, though transformers makes GPT-2's way of SmolLM's."""
    checkpoint = edited(dense, tmp_path / "in", {})
    own = byte_level()
    own.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)]
    )
    own.save_pretrained(checkpoint.folder)
    gguf.write(checkpoint, tmp_path / "first")
    import_model(tmp_path / "first" / gguf.FILE, tmp_path / "again", "bfloat16", {})
    gguf.write(Checkpoint(tmp_path / "again"), tmp_path / "second")
    told = fields(tmp_path / "second")
    assert told["tokenizer.ggml.pre"] == "smollm"
    assert told["tokenizer.ggml.tokens"] == fields(tmp_path / "first")["tokenizer.ggml.tokens"]


@pytest.mark.parametrize("pre", [pre_tokenizers.Metaspace(), pre_tokenizers.ByteLevel(True), split(r"\w+")])
def test_any_other_way_is_refused(pre: Any, dense: Export, tmp_path: Path) -> None:
    checkpoint = edited(dense, tmp_path / "in", {})
    own = byte_level()
    own.backend_tokenizer.pre_tokenizer = pre
    own.save_pretrained(checkpoint.folder)
    with pytest.raises(Problem, match=r"tokenizer\.json: not a tokenizer that GGUF has a name for\n.*byte-level BPE"):
        gguf.write(checkpoint, tmp_path / "out")


def test_tokenizers_of_another_kind_are_refused(imported: Make, tmp_path: Path) -> None:
    with pytest.raises(Problem, match="not a tokenizer that GGUF has a name for"):
        gguf.write(Checkpoint(imported("llama")), tmp_path)


def test_more_tokens_than_embeddings_are_refused(dense: Export, tmp_path: Path) -> None:
    checkpoint = edited(dense, tmp_path / "in", {})
    byte_level(300).save_pretrained(checkpoint.folder)
    with pytest.raises(Problem, match="300 tokens, but the model has embeddings for 96"):
        gguf.write(checkpoint, tmp_path)
