"""Whether vLLM takes a quantised checkpoint, as far as its schema and its sources tell; vLLM itself is not run.

Looked up in vLLM's sources and its documentation of September 2026, in model_executor:

- layers/quantization/compressed_tensors/compressed_tensors.py: integer weights without quantised activations are read
  in format `pack-quantized` with strategy group or channel only.
- .../compressed_tensors/utils.py: layers that vLLM fuses are refused when only some of them are left in full
  precision; of their schemes the first one's is taken for all.
- kernels/linear/mixed_precision/marlin.py, layers/quantization/utils/marlin_utils.py: the usual kernel on GPUs takes
  4 and 8 bits if symmetric, 4 if not, and groups of 32, 64 or 128 or whole rows. Symmetric grids of other widths or
  groups have a kernel in the package `humming`, which is optional.
- .../compressed_tensors/compressed_tensors_embedding.py, in versions of 2026: an embedding is unpacked as 32 // bits
  codes a word and without zero points, so symmetric 2, 4 and 8 bits. Most families do not hand theirs its scheme:
  github.com/vllm-project/vllm/issues/54304, and pull request 45535, which names Llama and GPT-NeoX.
"""

from collections.abc import Mapping
from typing import Any

from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
GROUPS = (32, 64, 128)
EMBEDDINGS = ("embed", "wte")  # in the last part of their names


def vllm_faults(entry: Mapping[str, Any]) -> list[str]:
    """What is known to keep vLLM from taking a checkpoint, a sentence each; none: nothing is known.

    Args:
        entry: `quantization_config` of config.json.
    """
    try:
        config = QuantizationConfig.model_validate(dict(entry))
    except ValueError as error:
        return [f"compressed-tensors does not parse the entry: {error}"]
    schemes: dict[str, QuantizationArgs] = {}
    faults: list[str] = []
    for group in config.config_groups.values():
        schemes |= dict.fromkeys(group.targets, group.weights)
        if group.format not in (None, "pack-quantized"):
            faults.append(f"{_some(group.targets)}: format {group.format} is for quantised activations")
            continue
        tables = [name for name in group.targets if _is_embedding(name)]
        linears = [name for name in group.targets if name not in tables]
        faults += [f"{_some(linears)}: {fault}" for fault in _linear_faults(group.weights) if linears]
        faults += [f"{_some(tables)}: {fault}" for fault in _embedding_faults(group.weights) if tables]
    return faults + _torn(schemes)


def _linear_faults(weights: QuantizationArgs) -> list[str]:
    if weights.strategy not in ("group", "channel"):
        return [f"strategy {weights.strategy}; only group and channel are read"]
    faults = []
    if weights.num_bits not in ((4, 8) if weights.symmetric else (4,)):
        kind = "symmetric" if weights.symmetric else "asymmetric"
        faults.append(f"Marlin has no kernel for {weights.num_bits} bits, {kind}")
    if weights.strategy == "group" and weights.group_size not in GROUPS:
        faults.append(f"Marlin has no kernel for groups of {weights.group_size}")
    return faults


def _embedding_faults(weights: QuantizationArgs) -> list[str]:
    faults = ["an embedding on a grid is read for few architectures, and only by vLLM of 2026"]
    if weights.strategy not in ("group", "channel"):
        faults.append(f"strategy {weights.strategy}; only group and channel are read")
    if not weights.symmetric:
        faults.append("zero points of an embedding are not read")
    if weights.num_bits not in (2, 4, 8):
        faults.append(f"an embedding of {weights.num_bits} bits is unpacked wrongly: codes straddle words")
    return faults


def _torn(schemes: Mapping[str, QuantizationArgs]) -> list[str]:
    """Layers that are fused, but not of one scheme."""
    faults = []
    for parts in FUSED:
        blocks = dict.fromkeys(name.rpartition(".")[0] for name in schemes if name.rpartition(".")[2] in parts)
        torn = [block for block in blocks if not _alike([schemes.get(f"{block}.{part}") for part in parts])]
        if torn:
            faults.append(f"{_some(torn)}: {', '.join(parts)} are fused, so they have to share a scheme")
    return faults


def _alike(schemes: list[QuantizationArgs | None]) -> bool:
    return all(scheme == schemes[0] for scheme in schemes)


def _is_embedding(name: str) -> bool:
    return any(sign in name.rpartition(".")[2] for sign in EMBEDDINGS)


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
