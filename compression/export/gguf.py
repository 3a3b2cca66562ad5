"""The model as one GGUF file, for llama.cpp and what is built on it.

Weights on a grid keep their codes and scales (see gguf_blocks), all others their type; vectors are float32. Two things
differ from a Hugging Face folder. Tensors have other names. And for the architecture `llama`, rotary embeddings turn
neighbouring rows of q and k, 2i and 2i + 1, where transformers turns rows i and i + d/2 of a head's d: rows are moved.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter, LlamaFileType, RopeScalingType, get_tensor_name_map
from torch import Tensor
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from compression.core.adapter import read_adapter
from compression.core.checkpoint import Checkpoint
from compression.core.errors import Problem
from compression.core.files import write_atomically
from compression.export.gguf_blocks import Encode, Layout, on_grid, plain
from compression.export.gguf_tokenizer import add_tokenizer
from compression.quantization.grid import Grid
from compression.quantization.packed import PARTS, rounded_layers, unpack

FILE = "model.gguf"
ARCHITECTURES = {
    "LlamaForCausalLM": MODEL_ARCH.LLAMA,
    "MistralForCausalLM": MODEL_ARCH.LLAMA,
    "Qwen2ForCausalLM": MODEL_ARCH.QWEN2,
    "Qwen3ForCausalLM": MODEL_ARCH.QWEN3,
}
FILE_TYPES = {
    "F32": LlamaFileType.ALL_F32,
    "F16": LlamaFileType.MOSTLY_F16,
    "BF16": LlamaFileType.MOSTLY_BF16,
    "Q4_0": LlamaFileType.MOSTLY_Q4_0,
    "Q4_1": LlamaFileType.MOSTLY_Q4_1,
    "Q5_0": LlamaFileType.MOSTLY_Q5_0,
    "Q8_0": LlamaFileType.MOSTLY_Q8_0,
}


def write(checkpoint: Checkpoint, folder: Path) -> dict[str, Any]:
    """Writes `model.gguf` into a folder, made if need be, with one block of the model in memory.

    Returns:
        `file`, its `bytes`, `types` (how many tensors of each), `rounding` (of the offsets of Q4_1, the largest share
        of a step of the grid; 0: all values are those of the checkpoint) and `widened` (layers on a grid that no type
        of GGUF holds, stored in full precision, and why).

    Raises:
        Problem: an architecture, a rotary embedding, an activation or a tokenizer that is not supported; an adapter.
    """
    config = AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True, trust_remote_code=False)
    architecture = supported(str(checkpoint.folder / "config.json"), config.architectures)
    if read_adapter(checkpoint) is not None:
        raise Problem(str(checkpoint.folder), "an adapter lies beside the weights", "export a checkpoint that has none")
    writer = GGUFWriter(None, MODEL_ARCH_NAMES[architecture])
    _describe(writer, config, checkpoint)
    add_tokenizer(writer, checkpoint.folder, config.vocab_size)
    layouts = {name: layout for name, layout, _ in _tensors(checkpoint, config)}
    matrices = Counter(layout.type.name for layout in layouts.values() if len(layout.shape) > 1)
    writer.add_file_type(FILE_TYPES[matrices.most_common(1)[0][0]])
    for name, layout in layouts.items():  # numpy's type plays no part where GGUF's own is given
        writer.add_tensor_info(name, layout.shape, np.dtype(np.float32), layout.nbytes, layout.type)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / FILE, lambda draft: _fill(writer, draft, _tensors(checkpoint, config)))
    return {
        "file": FILE,
        "bytes": (folder / FILE).stat().st_size,
        "types": dict(sorted(Counter(layout.type.name for layout in layouts.values()).items())),
        "rounding": max(layout.rounding for layout in layouts.values()),
        "widened": {name: layout.widened for name, layout in layouts.items() if layout.widened},
    }


def supported(where: str, architectures: list[str] | None) -> Any:
    """GGUF's own architecture of a model.

    Raises:
        Problem: it is not among those that are supported.
    """
    name = (architectures or ["none"])[0]
    if name not in ARCHITECTURES:
        raise Problem(where, f"{name} is not written as GGUF", "supported: " + ", ".join(ARCHITECTURES))
    return ARCHITECTURES[name]


def _describe(writer: GGUFWriter, config: Any, checkpoint: Checkpoint) -> None:
    """What llama.cpp has to know of the model besides its tensors."""
    where = str(checkpoint.folder / "config.json")
    if config.hidden_act != "silu":
        raise Problem(where, f"activation {config.hidden_act} is not written as GGUF", "supported: silu")
    head = _head_width(config)
    writer.add_type("model")
    if licence := checkpoint.manifest.get("licence"):
        writer.add_license(licence)
    # Beyond a sliding window llama.cpp would look further back than the model does.
    writer.add_context_length(min(config.max_position_embeddings, _window(config)))
    writer.add_block_count(checkpoint.depth)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(head)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif rope["rope_type"] not in ("default", "llama3"):
        raise Problem(
            where, f"rope_type {rope['rope_type']} is not written as GGUF", "supported: default, linear, llama3"
        )


def _fill(writer: GGUFWriter, file: Path, tensors: Iterator[tuple[str, Layout, Encode]]) -> None:
    writer.write_header_to_file(file)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, _, encode in tensors:
        writer.write_tensor_data(encode())
    writer.close()


def _tensors(checkpoint: Checkpoint, config: Any) -> Iterator[tuple[str, Layout, Encode]]:
    """Every tensor of the file: its name there, its layout and what makes its bytes."""
    architecture = ARCHITECTURES[config.architectures[0]]
    names = get_tensor_name_map(architecture, checkpoint.depth)
    bits = checkpoint.manifest.get("quantization", {}).get("bits", {})
    sparse = set(checkpoint.masks())
    if config.rope_parameters["rope_type"] == "llama3":
        yield "rope_freqs.weight", *plain(_frequency_factors(config))
    for index in range(-1, checkpoint.depth):
        tensors = checkpoint.outer() if index < 0 else checkpoint.block(index)
        rounded = rounded_layers(tensors)
        whole = {name for name in tensors if name.rpartition(".")[2] not in PARTS}
        for name in sorted(whole | {f"{layer}.weight" for layer in rounded}):
            layer, _, part = name.rpartition(".")
            codes = part == "weight" and layer in rounded
            weight, grid = unpack(layer, tensors, bits[layer]) if codes else (tensors[name], None)
            own = names.get_name(layer)
            if own is None:
                raise Problem(name, "has no place in a GGUF file of this architecture")
            if architecture == MODEL_ARCH.LLAMA and (heads := _rotated_heads(layer, config)):
                order = _neighbours(len(weight), heads)
                weight, grid = weight[order], grid and _reordered(grid, order)
            yield f"{own}.{part}", *(plain(weight) if grid is None else on_grid(weight, grid, layer not in sparse))


def _rotated_heads(layer: str, config: Any) -> int:
    """How many heads a layer's rows form whose halves are rotated against each other; 0 if they are not."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return heads.get(layer.rpartition(".")[2], 0)


def _neighbours(rows: int, heads: int) -> Tensor:
    """Which row goes where: 0, d/2, 1, d/2 + 1, ... of each head's d."""
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).flatten()


def _reordered(grid: Grid, order: Tensor) -> Grid:
    """The grid of a matrix whose rows [out] have been put in another order; one of a whole matrix stays as it is."""
    if len(grid.scale) == 1:
        return grid
    return Grid(grid.bits, grid.scale[order], None if grid.zero is None else grid.zero[order])


def _frequency_factors(config: Any) -> Tensor:
    """By what Llama 3 divides each rotary frequency, float32 [d / 2]."""
    base = 1 / config.rope_parameters["rope_theta"] ** (torch.arange(0, _head_width(config), 2) / _head_width(config))
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    return base / scaled


def _head_width(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _window(config: Any) -> int:
    """How many tokens the model looks back at; as many as there are positions where it has no sliding window."""
    return int(getattr(config, "sliding_window", None) or config.max_position_embeddings)
