"""Stages in one call, as tasks/ run them."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from compression.core import masks
from compression.core.checkpoint import Checkpoint, CheckpointWriter
from compression.core.journal import Journal
from compression.core.skeleton import Skeleton
from compression.pruning.method import Settings
from compression.pruning.pattern import Pattern
from compression.pruning.run import prune_model
from compression.quantization import rtn
from compression.quantization.method import Settings as GridSettings
from compression.quantization.packed import block_reader, plain_outer
from compression.quantization.run import quantize_model
from compression.quantization.scheme import Scheme, anatomy, config_entry, to_manifest

CPU = torch.device("cpu")


class Killed(Exception):
    """Stands for a kill: nothing in compression/ knows it."""


def lineage(source: Checkpoint) -> dict[str, Any]:
    return {key: source.manifest[key] for key in ("blocks", "layers", "quantization") if key in source.manifest}


def prune(
    source: Path,
    target: Path,
    method: ModuleType,
    pattern: Pattern,
    ids: Tensor,
    dtype: torch.dtype = torch.float32,
    settings: Settings | None = None,
    passes: int = 1,
) -> Checkpoint:
    """Prunes `source` into `target`, with its journal beside it."""
    checkpoint = Checkpoint(source)
    writer = CheckpointWriter(target, source)
    patterns = dict.fromkeys(checkpoint.layers, pattern)
    prune_model(checkpoint, writer, journal(target), method, patterns, settings or Settings(), ids, CPU, dtype, passes)
    writer.finish(checkpoint.depth, lineage(checkpoint))
    return Checkpoint(target)


def quantize(
    source: Checkpoint,
    target: Path,
    group_size: int = 32,
    method: ModuleType = rtn,
    first: int = 8,
    ids: Tensor | None = None,
    settings: GridSettings | None = None,
    bits: int | None = None,
) -> Checkpoint:
    """4 bits, but `first` for block 0; or `bits` for all."""
    wide = {layer: first if layer.startswith(f"{source.blocks}.0.") else 4 for layer in source.layers}
    widths = dict.fromkeys(wide, bits) if bits else wide
    writer, settings = CheckpointWriter(target, source.folder), settings or GridSettings(group_size)
    schemes = {layer: Scheme(width, settings.group_size, settings.symmetric) for layer, width in widths.items()}
    ids, model = torch.empty(0, 0, dtype=torch.int64) if ids is None else ids, anatomy(source.folder)
    quantize_model(source, writer, journal(target), method, schemes, model, settings, ids, CPU, torch.float32)
    config = source.config() | {"quantization_config": config_entry(schemes, model)}
    record = lineage(source) | {"quantization": to_manifest(schemes)}
    writer.finish(source.depth, record, config)
    return Checkpoint(target)


def journal(target: Path) -> Journal:
    return Journal(target.with_name(f"{target.name}-journal"))


def whole_model(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model as transformers loads it."""
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    model: nn.Module = getattr(transformers, name).from_pretrained(folder, dtype=dtype)
    return model.eval()


@torch.no_grad()
def whole_logits(folder: Path, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    logits: Tensor = whole_model(folder, dtype)(input_ids=ids).logits
    return logits


def make_skeleton(folder: Path, dtype: torch.dtype = torch.float32) -> Skeleton:
    checkpoint = Checkpoint(folder)
    return Skeleton(folder, plain_outer(checkpoint), block_reader(checkpoint), CPU, dtype)


@torch.no_grad()
def walked_logits(folder: Path, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Block by block through the skeleton."""
    skeleton = make_skeleton(folder, dtype)
    hidden = skeleton.begin(ids)
    for index in range(skeleton.depth):
        skeleton.load(index)
        hidden = skeleton.run(index, hidden, ids)
        skeleton.release(index)
    return skeleton.end(hidden, ids)


def all_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Every tensor as it is stored."""
    tensors = checkpoint.outer()
    for index in range(checkpoint.depth):
        tensors |= checkpoint.block(index)
    return tensors


def all_masks(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Masks bool [out, in] by layer."""
    return {name: masks.unpack(bits, checkpoint.layers[name][1]) for name, bits in checkpoint.masks().items()}


def hashes(folder: Path) -> dict[str, str]:
    """Hash of every file, by name."""
    files: dict[str, str] = json.loads((folder / "manifest.json").read_text())["files"]
    return files
