"""Turns a model as others store it (a Hugging Face folder, or one GGUF file) into a block-sharded checkpoint."""

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, apply_renamings
from transformers.integrations.gguf.gguf_tokenizer_mapping import get_gguf_tokenizer

from compression.core.checkpoint import CheckpointWriter, turned
from compression.core.device import DTYPES
from compression.core.errors import Problem
from compression.core.files import write_text
from compression.core.progress import progress
from compression.core.skeleton import TurnedLinear, empty_model, find_blocks, linears

SMALL_FILES = {".json", ".txt", ".model", ".jinja"}

Reader = Callable[[str], Tensor]


def import_model(source: Path, target: Path, dtype: str, record: dict[str, Any]) -> None:
    """Writes the model in `source` to the folder `target` as a block-sharded checkpoint.

    Args:
        source: a folder with config.json and safetensors, or a .gguf file.
        dtype: type in which the weights are stored: bfloat16, float16, float32, or `source`.
        record: goes into the manifest.

    Raises:
        Problem: pickled weights, no weights, a weight missing, NaN or infinite weights (named by tensor),
            an architecture without blocks.
    """
    with tempfile.TemporaryDirectory() as scratch:
        template = Path(scratch)
        if source.suffix == ".gguf":
            names, read = _open_gguf(source, template, dtype)
        else:
            names, read = _open_folder(source, template)
        model = empty_model(template)
        config = json.loads((template / "config.json").read_text(encoding="utf-8"))
        transposed = [name for name, module in model.named_modules() if isinstance(module, TurnedLinear)]
        _write(model, names, read, config, CheckpointWriter(target, template, transposed), dtype, record)


def _write(
    model: nn.Module,
    names: set[str],
    read: Reader,
    config: dict[str, Any],
    writer: CheckpointWriter,
    dtype: str,
    record: dict[str, Any],
) -> None:
    path = find_blocks(model)
    blocks: nn.ModuleList = model.get_submodule(path)  # type: ignore[assignment]
    layers = {
        name: [layer.out_features, layer.in_features]
        for index, block in enumerate(blocks)
        for name, layer in linears(block, f"{path}.{index}").items()
    }
    stored = _stored_names(model, names)
    types: set[torch.dtype] = set()

    def tensors(belongs: Callable[[str], bool]) -> dict[str, Tensor]:
        found = {name: _sound(name, read(stored[name])) for name in stored if belongs(name)}
        if dtype != "source":
            found = {name: t.to(DTYPES[dtype]) if t.is_floating_point() else t for name, t in found.items()}
        types.update(tensor.dtype for tensor in found.values() if tensor.is_floating_point())
        return turned(found, writer.transposed)

    writer.write_outer(tensors(lambda name: not name.startswith(path + ".")))
    for index in progress(range(len(blocks)), what="download", unit="block"):
        prefix = f"{path}.{index}."
        writer.write_block(index, tensors(lambda name, prefix=prefix: name.startswith(prefix)))  # type: ignore[misc]
    if len(types) == 1:
        config["dtype"] = str(types.pop()).removeprefix("torch.")
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    writer.finish(len(blocks), record | {"blocks": path, "layers": layers}, config)


def _stored_names(model: nn.Module, names: set[str]) -> dict[str, str]:
    """Name in the model -> name in the file; files may use a family's older names, and may or may not carry the
    base model's prefix.

    Raises:
        Problem: a weight of the architecture is not in the file.
    """
    model.tie_weights()  # type: ignore[operator]
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tied -= {name for name, _ in model.named_parameters()}
    prefix = f"{model.base_model_prefix}."
    renamings = [step for step in get_model_conversion_mapping(model) if isinstance(step, WeightRenaming)]
    today = {apply_renamings(name, renamings): name for name in sorted(names)}
    found, missing = {}, []
    for name in model.state_dict():
        if name in tied:
            continue
        candidates = [name, name.removeprefix(prefix), prefix + name]
        match = next((candidate for candidate in candidates if candidate in today), None)
        if match:
            found[name] = today[match]
        else:
            missing.append(name)
    if missing:
        raise Problem(
            type(model).__name__,
            f"{len(missing)} weights are not in the file, the first is `{missing[0]}`",
            "is it whole?",
        )
    return found


def _sound(name: str, tensor: Tensor) -> Tensor:
    if tensor.is_floating_point() and not tensor.isfinite().all():
        raise Problem(name, "holds NaN or infinite values", "the model file is broken, or was trained to no good end")
    return tensor


def _open_folder(source: Path, template: Path) -> tuple[set[str], Reader]:
    """Tensor names in a Hugging Face folder, and a reader that holds one tensor at a time."""
    shards = sorted(source.glob("*.safetensors"))
    if not (source / "config.json").exists():
        raise Problem(str(source), "no config.json here", "a model folder as transformers saves it")
    if not shards:
        pickled = any(source.glob("*.bin")) or any(source.glob("*.pt"))
        hint = "pickled weights are never loaded; convert them to safetensors" if pickled else ""
        raise Problem(str(source), "no .safetensors files here", hint)
    for file in source.iterdir():
        if file.suffix in SMALL_FILES and not file.name.endswith(".index.json") and file.name != "manifest.json":
            shutil.copyfile(file, template / file.name)
    where: dict[str, Path] = {}
    for shard in shards:
        try:
            with safe_open(shard, framework="pt") as file:
                where |= dict.fromkeys(file.keys(), shard)
        except SafetensorError as error:
            raise Problem(str(shard), f"not a whole safetensors file: {error}") from None

    def read(name: str) -> Tensor:
        with safe_open(where[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    return set(where), read


def _open_gguf(source: Path, template: Path, dtype: str) -> tuple[set[str], Reader]:
    """Tensors of a GGUF file, dequantised; config and tokenizer as transformers derives them from it."""
    options: dict[str, Any] = {"gguf_file": source.name, "local_files_only": True, "trust_remote_code": False}
    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        quantization_config=GgufConfig(dequantize=True),
        dtype=DTYPES.get(dtype, torch.float32),
        **options,
    )
    AutoTokenizer.from_pretrained(source.parent, **options).save_pretrained(template)
    _mend_tokenizer(source, template)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(template)
    model.generation_config.save_pretrained(template)
    tensors = model.state_dict()
    return set(tensors), tensors.__getitem__


def _mend_tokenizer(source: Path, template: Path) -> None:
    """Undoes what transformers makes of a GGUF file's tokenizer.

    It adds a token of its own, GPT-2's end of text, to a vocabulary without one, and no embedding stands behind it. And
    it does not know every way in which text is split before merging: then it splits like GPT-2, which for `smollm`
    differs where more than one blank stands before a digit. A GGUF file that is made of the checkpoint has to say the
    way's name again, so it is noted under `gguf_pre`.
    """
    _, told, _ = get_gguf_tokenizer(str(source))
    config, file = template / "tokenizer_config.json", template / "tokenizer.json"
    if name := told.get("pre_tokenizer_type"):
        _write_json(config, json.loads(config.read_text(encoding="utf-8")) | {"gguf_pre": name})
    if tokens := told.get("tokens"):
        saved = json.loads(file.read_text(encoding="utf-8"))
        there = [token for token in saved["added_tokens"] if token["id"] < len(tokens)]
        if len(there) < len(saved["added_tokens"]):
            _write_json(file, saved | {"added_tokens": there})


def _write_json(file: Path, content: dict[str, Any]) -> None:
    write_text(file, json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
