"""A model as others store it becomes a checkpoint, or the user is told what is wrong with it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from compression.core.checkpoint import OUTER, Checkpoint
from compression.core.errors import Problem
from compression.importing import import_model
from tests import tiny
from tests.compression.helpers import all_tensors, hashes, whole_model
from tests.conftest import Make


@pytest.fixture
def copy(original: Make, tmp_path: Path) -> Path:
    """A llama that may be spoilt."""
    return Path(shutil.copytree(original("llama"), tmp_path / "copy"))


def change(folder: Path, tensors: dict[str, Tensor] | None = None, drop: str = "") -> None:
    """Replaces tensors in model.safetensors, and drops one."""
    stored = load_file(folder / "model.safetensors") | (tensors or {})
    stored.pop(drop, None)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


def test_manifest_knows_the_layers(original: Make, imported: Make) -> None:
    checkpoint = Checkpoint(imported("llama"))
    assert (checkpoint.blocks, checkpoint.depth) == ("model.layers", 3)
    assert checkpoint.manifest["source"] == "tiny"
    model = whole_model(original("llama"))
    for name, shape in checkpoint.layers.items():
        assert list(model.get_parameter(f"{name}.weight").shape) == shape
    own = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert [name.rpartition(".")[2] for name in checkpoint.layers] == own * 3


def test_missing_weight_is_named(copy: Path, tmp_path: Path) -> None:
    change(copy, drop="model.layers.1.mlp.up_proj.weight")
    with pytest.raises(Problem, match=r"1 weights are not in the file, the first is `model\.layers\.1\.mlp\.up_proj"):
        import_model(copy, tmp_path / "out", "source", {})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.2.mlp.up_proj.weight"])
def test_broken_weight_is_named(name: str, value: float, copy: Path, tmp_path: Path) -> None:
    tensor = load_file(copy / "model.safetensors")[name].clone()
    tensor.view(-1)[7] = value
    change(copy, {name: tensor})
    with pytest.raises(Problem, match=rf"{name}: holds NaN or infinite values"):
        import_model(copy, tmp_path / "out", "source", {})
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize("pickle", ["pytorch_model.bin", "model.pt"])
def test_pickles_are_never_loaded(pickle: str, copy: Path, tmp_path: Path) -> None:
    (copy / "model.safetensors").rename(copy / pickle)
    with pytest.raises(Problem, match=r"no \.safetensors files here\n.*pickled weights are never loaded"):
        import_model(copy, tmp_path / "out", "source", {})


def test_folder_without_config_or_weights(copy: Path, tmp_path: Path) -> None:
    (copy / "model.safetensors").rename(tmp_path / "elsewhere")
    with pytest.raises(Problem, match=r"no \.safetensors files here$"):
        import_model(copy, tmp_path / "out", "source", {})
    (copy / "config.json").unlink()
    with pytest.raises(Problem, match=r"no config\.json here"):
        import_model(copy, tmp_path / "out", "source", {})


def test_cut_off_file_is_named(copy: Path, tmp_path: Path) -> None:
    content = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(Problem, match=r"model\.safetensors: not a whole safetensors file"):
        import_model(copy, tmp_path / "out", "source", {})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_weights_are_stored_as_asked(dtype: str, original: Make, tmp_path: Path) -> None:
    import_model(original("llama"), tmp_path / "out", dtype, {})
    expected = whole_model(original("llama"), getattr(torch, dtype)).state_dict()
    stored = all_tensors(Checkpoint(tmp_path / "out"))
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[name], expected[name]) for name in expected)
    assert {tensor.dtype for tensor in stored.values()} == {getattr(torch, dtype)}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype


def test_source_type_is_kept(original: Make, tmp_path: Path) -> None:
    half = whole_model(original("opt"), torch.bfloat16)
    half.save_pretrained(tmp_path / "half")  # type: ignore[operator]
    import_model(tmp_path / "half", tmp_path / "out", "source", {})
    assert {t.dtype for t in all_tensors(Checkpoint(tmp_path / "out")).values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma2", "gemma3", "opt"])
def test_tied_head_is_not_stored(family: str, imported: Make) -> None:
    names = set(Checkpoint(imported(family)).outer())
    assert "lm_head.weight" not in names
    assert any(name.endswith("embed_tokens.weight") for name in names)


def test_untied_head_is_stored(imported: Make) -> None:
    assert "lm_head.weight" in Checkpoint(imported("llama")).outer()


def test_prefix_of_the_file_does_not_matter(tmp_path: Path, ids: Tensor) -> None:
    """A bare BertModel out of a file whose names start with `bert.`."""
    whole = tiny.build("BertForNextSentencePrediction", tiny.FAMILIES["bert"][1]).eval()
    whole.save_pretrained(tmp_path / "whole")  # type: ignore[operator]
    config = json.loads((tmp_path / "whole" / "config.json").read_text()) | {"architectures": ["BertModel"]}
    (tmp_path / "whole" / "config.json").write_text(json.dumps(config))
    import_model(tmp_path / "whole", tmp_path / "out", "source", {})
    assert Checkpoint(tmp_path / "out").blocks == "encoder.layer"
    bare = transformers.BertModel.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        expected = whole.bert(input_ids=ids).last_hidden_state  # type: ignore[operator, union-attr]
        assert torch.equal(bare(input_ids=ids).last_hidden_state, expected)


def test_file_without_the_prefix(original: Make, imported: Make, tmp_path: Path) -> None:
    """The other way round: a causal model whose blocks are stored without `model.`."""
    shutil.copytree(original("qwen2"), tmp_path / "bare")
    stored = load_file(tmp_path / "bare" / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in stored.items()}
    save_file(bare, tmp_path / "bare" / "model.safetensors", metadata={"format": "pt"})
    import_model(tmp_path / "bare", tmp_path / "out", "source", {"source": "tiny", "licence": "none"})
    assert hashes(tmp_path / "out") == hashes(imported("qwen2"))


def test_several_shards_are_one_model(original: Make, imported: Make, tmp_path: Path) -> None:
    whole_model(original("llama")).save_pretrained(tmp_path / "sharded", max_shard_size="40KB")  # type: ignore[operator]
    tiny.tokenizer().save_pretrained(tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    import_model(tmp_path / "sharded", tmp_path / "out", "source", {})
    blocks = [name for name in hashes(tmp_path / "out") if name.startswith("block-")] + [OUTER]
    assert all(hashes(tmp_path / "out")[name] == hashes(imported("llama"))[name] for name in blocks)


def test_tokenizer_comes_along(imported: Make) -> None:
    text = "a grey gull remembered a distant ship."
    tokenizer = transformers.AutoTokenizer.from_pretrained(imported("llama"))
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert torch.equal(ids, tiny.encode(text, len(text)))
    assert tokenizer.decode(ids[0]) == text


def test_experts_of_another_build_are_refused_by_name(original: Make, tmp_path: Path) -> None:
    message = r"GptOssForCausalLM: model\.layers\.0\.mlp\.experts: experts with biases, transposed.*not supported"
    with pytest.raises(Problem, match=message):
        import_model(original("gpt_oss"), tmp_path / "out", "source", {})
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_config_holds_nothing_of_this_machine(imported: Make, original: Make) -> None:
    """Same input, same bytes: nothing of where the model came from on this disk is written."""
    config = json.loads((imported("llama") / "config.json").read_text())
    assert not [key for key in config if key.startswith("_")]
    assert str(original("llama")) not in (imported("llama") / "config.json").read_text()
