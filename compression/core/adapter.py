"""A low-rank adapter beside the weights, in the folder and the format of peft.

    adapter/adapter_config.json           r, alpha, layers and the rest of peft's LoraConfig
    adapter/adapter_model.safetensors     base_model.model.L.lora_A.weight [r, in], .lora_B.weight [out, r] by layer L

The layer then computes with W + s B A, s = alpha / r. Added to W for good, the product would fill up what pruning
has emptied, so the two are kept apart. `PeftModel.from_pretrained(model, folder / "adapter")` loads it as it is.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compression.core.checkpoint import ADAPTER, Checkpoint
from compression.core.errors import Problem
from compression.core.files import read_tensors, sha256, write_tensors, write_text

ADAPTER_CONFIG = f"{ADAPTER}/adapter_config.json"
ADAPTER_TENSORS = f"{ADAPTER}/adapter_model.safetensors"


class Adapter(NamedTuple):
    """What is added to the weights.

    Attributes:
        scaling: s.
        layers: A [r, in] and B [out, r] by layer.
    """

    scaling: float
    layers: dict[str, tuple[Tensor, Tensor]]

    @torch.no_grad()
    def added(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Plain tensors by full name, with W + s B A in float32 for the weights of adapted layers among them."""
        summed = {
            f"{layer}.weight": tensors[f"{layer}.weight"].float() + self.scaling * (B.float() @ A.float())
            for layer, (A, B) in self.layers.items()
            if f"{layer}.weight" in tensors
        }
        return tensors | summed


def read_adapter(checkpoint: Checkpoint) -> Adapter | None:
    """The adapter of a checkpoint, None if it has none.

    Raises:
        Problem: a file is missing, or is not the one that the manifest names.
    """
    files = checkpoint.manifest["files"]
    if ADAPTER_TENSORS not in files:
        return None
    tensors = read_tensors(checkpoint.folder / ADAPTER_TENSORS, files[ADAPTER_TENSORS])
    config = _read_config(checkpoint.folder / ADAPTER_CONFIG, files.get(ADAPTER_CONFIG))
    layers = [layer for layer in checkpoint.layers if _name(layer, "A") in tensors]
    return Adapter(
        config["lora_alpha"] / config["r"],
        {layer: (tensors[_name(layer, "A")], tensors[_name(layer, "B")]) for layer in layers},
    )


def write_adapter(folder: Path, layers: Mapping[str, tuple[Tensor, Tensor]], config: Mapping[str, Any]) -> None:
    """Writes an adapter into a checkpoint's folder, before the checkpoint is finished.

    Args:
        layers: A [r, in] and B [out, r] by layer, written in their own type.
        config: adapter_config.json, which names no path of this machine, so that equal adapters are equal bytes.
    """
    (folder / ADAPTER).mkdir(exist_ok=True)
    pairs = [
        (_name(layer, part), tensor) for layer, pair in layers.items() for part, tensor in zip("AB", pair, strict=True)
    ]
    write_tensors(folder / ADAPTER_TENSORS, dict(pairs))
    write_text(folder / ADAPTER_CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")


def _name(layer: str, part: str) -> str:
    return f"base_model.model.{layer}.lora_{part}.weight"


def _read_config(path: Path, expected_sha256: str | None) -> dict[str, Any]:
    if not path.exists():
        raise Problem(str(path), "the file is missing", "run the stage that makes it again")
    if sha256(path) != expected_sha256:
        raise Problem(
            str(path),
            "the file is not the one its manifest names (corrupt or changed)",
            "delete its folder and the damaged object in .dvc/cache, then run the stage again",
        )
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return config
