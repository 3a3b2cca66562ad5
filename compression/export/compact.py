"""Sparse checkpoints with the pruned weights left out: a bitmask and what is kept, in a form of our own.

compressed-tensors 0.20 still names a format `sparse-bitmask`, but has no compressor for it any more, and vLLM refuses a
config that asks for sparsity. So this form is for keeping and sending only: no runtime reads it, and `restore` makes
the checkpoint again that they do read.

    block-00000.safetensors ...   in place of a masked layer's L.weight_packed int32 or L.weight [out, in]
        L.mask                    uint8 [out, ceil(in / 8)], first input in the high bit
        L.kept                    what the mask keeps, row after row: codes of b bits side by side in int32 words, or
                                  weights in their own type
    compact.json                  the checkpoint's own manifest, and the hash of every file
    all others                    as they are in the checkpoint

Scales, zero points, and all that has no mask stay as they are. A pruned weight comes back as the code of zero, or as
+0: where a checkpoint that is not quantised holds -0, that sign is the one thing lost.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from torch import Tensor

from compression.core import masks
from compression.core.adapter import ADAPTER_TENSORS
from compression.core.checkpoint import INDEX, MASKS, OUTER, Checkpoint, CheckpointWriter, block_file
from compression.core.errors import Problem
from compression.core.files import read_tensors, sha256, write_tensors, write_text
from compression.quantization.grid import Grid
from compression.quantization.packed import plain_outer, plain_weights, unpack

COMPACT = "compact.json"
VERSION = 1


def write(checkpoint: Checkpoint, folder: Path) -> dict[str, Any]:
    """Writes the compact form into a folder, made if need be, with one block in memory.

    Returns:
        bytes: of the weight files, masks in them. bytes_before: of the checkpoint's weight files, its masks, which no
        runtime needs, not counted. bits_per_weight: 8 bytes / parameters, all of the model, embeddings and norms too.

    Raises:
        Problem: nothing is pruned, a pruned weight is not zero, or a file of the checkpoint is not sound.
    """
    packed = checkpoint.masks()
    if not packed:
        raise Problem(str(checkpoint.folder), "has no masks, so there is nothing to leave out", "prune it first")
    folder.mkdir(parents=True, exist_ok=True)
    bits = _bits(checkpoint.manifest)
    parameters = sum(tensor.numel() for tensor in plain_outer(checkpoint).values())
    for index in range(checkpoint.depth):
        tensors, keep = checkpoint.block(index), checkpoint.block_masks(index, packed)
        parameters += sum(tensor.numel() for tensor in plain_weights(tensors, bits).values())
        for layer, mask in keep.items():
            tensors = _without_pruned(layer, tensors, mask, bits)
        write_tensors(folder / block_file(index), tensors)
    blocks = [block_file(index) for index in range(checkpoint.depth)]
    others = [name for name in checkpoint.manifest["files"] if name not in (MASKS, INDEX, *blocks)]
    for name in others:
        _copy(checkpoint.folder / name, folder / name, checkpoint.manifest["files"][name])
    files = {name: sha256(folder / name) for name in sorted([*blocks, *others])}
    manifest = {"version": VERSION, "checkpoint": checkpoint.manifest, "files": files}
    write_text(folder / COMPACT, json.dumps(manifest, indent=2) + "\n")
    weights = [OUTER, *blocks, *(name for name in others if name == ADAPTER_TENSORS)]
    size, before = (sum((place / name).stat().st_size for name in weights) for place in (folder, checkpoint.folder))
    return {"bytes": size, "bytes_before": before, "bits_per_weight": 8 * size / parameters}


def read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All tensors as `Checkpoint` gives them, by full name, and its masks bool [out, in] by layer.

    Raises:
        Problem: no compact form is there, or a file is missing, cut off or changed.
    """
    manifest = _manifest(folder)
    tensors = read_tensors(folder / OUTER, manifest["files"].get(OUTER))
    keep: dict[str, Tensor] = {}
    for _, block, masks_of_block in _blocks(folder, manifest):
        tensors |= block
        keep |= masks_of_block
    return tensors, keep


def restore(folder: Path, target: Path) -> Checkpoint:
    """Writes the ordinary checkpoint again, tensors and masks as they were, with one block in memory.

    Args:
        folder: of the compact form.
        target: of the checkpoint, made if need be.

    Raises:
        Problem: no compact form is there, or a file is missing, cut off or changed.
    """
    manifest = _manifest(folder)
    with tempfile.TemporaryDirectory() as nothing:  # no template: the small files are those of the compact form
        writer = CheckpointWriter(target, Path(nothing), manifest["checkpoint"].get("transposed"))
    blocks = {block_file(index) for index in range(manifest["checkpoint"]["depth"])}
    for name in manifest["files"].keys() - blocks:
        _copy(folder / name, target / name, manifest["files"][name])
    for index, tensors, keep in _blocks(folder, manifest):
        writer.write_block(index, tensors, keep)
    record = {key: value for key, value in manifest["checkpoint"].items() if key not in ("depth", "files")}
    writer.finish(manifest["checkpoint"]["depth"], record)
    return Checkpoint(target)


def _without_pruned(layer: str, tensors: dict[str, Tensor], mask: Tensor, bits: dict[str, int]) -> dict[str, Tensor]:
    """A block's tensors with the mask [out, in] of a layer and what it keeps, in place of the layer's weight."""
    tensors = dict(tensors)
    if f"{layer}.weight_packed" in tensors:
        codes, grid = unpack(layer, tensors, bits[layer])
        masks.prove(layer, ~grid.zeros(codes), mask)
        del tensors[f"{layer}.weight_packed"]
        kept = pack_to_int32(codes[mask][None], grid.bits)[0]
    else:
        weight = tensors.pop(f"{layer}.weight")
        masks.prove(layer, weight, mask)
        kept = weight[mask]
    return tensors | {f"{layer}.mask": masks.pack(mask), f"{layer}.kept": kept}


def _with_pruned(layer: str, tensors: dict[str, Tensor], mask: Tensor, bits: dict[str, int]) -> dict[str, Tensor]:
    """The inverse of `_without_pruned`."""
    tensors = {name: tensor for name, tensor in tensors.items() if name != f"{layer}.mask"}
    kept = tensors.pop(f"{layer}.kept")
    if f"{layer}.weight_scale" not in tensors:
        weight = kept.new_zeros(mask.shape)
        weight[mask] = kept
        return tensors | {f"{layer}.weight": weight}
    codes = _grid(layer, tensors, mask, bits[layer]).codes(torch.zeros(mask.shape))
    count = torch.Size((1, int(mask.sum())))
    codes[mask] = unpack_from_int32(kept[None], bits[layer], count)[0]
    return tensors | {f"{layer}.weight_packed": pack_to_int32(codes, bits[layer])}


def _grid(layer: str, tensors: dict[str, Tensor], mask: Tensor, bits: int) -> Grid:
    """The grid of a layer whose codes are not among its tensors."""
    stand_in = {f"{layer}.weight_packed": pack_to_int32(torch.zeros(mask.shape, dtype=torch.int8), bits)}
    return unpack(layer, tensors | stand_in, bits)[1]


def _blocks(folder: Path, manifest: dict[str, Any]) -> Iterator[tuple[int, dict[str, Tensor], dict[str, Tensor]]]:
    """Number, tensors and masks bool [out, in] of each block."""
    layers: dict[str, list[int]] = manifest["checkpoint"]["layers"]
    bits = _bits(manifest["checkpoint"])
    for index in range(manifest["checkpoint"]["depth"]):
        tensors = read_tensors(folder / block_file(index), manifest["files"].get(block_file(index)))
        keep = {
            layer: masks.unpack(tensors[f"{layer}.mask"], layers[layer][1])
            for layer in layers
            if f"{layer}.mask" in tensors
        }
        for layer, mask in keep.items():
            tensors = _with_pruned(layer, tensors, mask, bits)
        yield index, tensors, keep


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((folder / COMPACT).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Problem(str(folder / COMPACT), "no compact checkpoint here") from None
    except ValueError as error:
        raise Problem(str(folder / COMPACT), f"not JSON: {error}", "write it again") from None
    if manifest.get("version") != VERSION:
        raise Problem(str(folder / COMPACT), f"version {manifest.get('version')} is not known", f"valid: {VERSION}")
    return manifest


def _bits(manifest: dict[str, Any]) -> dict[str, int]:
    bits: dict[str, int] = manifest.get("quantization", {}).get("bits", {})
    return bits


def _copy(source: Path, target: Path, expected_sha256: str) -> None:
    """Copies a file that has to be the one that its manifest names."""
    if not source.exists() or sha256(source) != expected_sha256:
        raise Problem(str(source), "the file is missing, cut off or changed", "make its folder anew")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
