"""A model on disk: a Hugging Face folder with one safetensors file per block.

    config.json, tokenizer files          as transformers writes them
    model.safetensors.index.json          tensor name -> file
    outer.safetensors                     embeddings, final norm, head: all that is in no block
    block-00000.safetensors ...           one decoder or encoder block each
    masks.safetensors                     once pruned: packed bits, one tensor a layer
    scales.safetensors                    if pruned on to a grid and still there: its scales, one tensor a layer
    adapter/                              if retrained by plain LoRA: see compression.core.adapter
    manifest.json                         where it comes from, and the hash of every file above

`AutoModelForCausalLM.from_pretrained(folder)` loads it as it is. One file a block lets a stage stream, and
lets DVC hash in parallel and store an unchanged block once.
"""

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from compression.core import masks
from compression.core.errors import Problem
from compression.core.files import join_tensors, read_header, read_tensors, sha256, write_tensors, write_text

INDEX = "model.safetensors.index.json"
MANIFEST = "manifest.json"
MASKS = "masks.safetensors"
SCALES = "scales.safetensors"
ADAPTER = "adapter"
OUTER = "outer.safetensors"


def block_file(index: int) -> str:
    return f"block-{index:05d}.safetensors"


class Checkpoint:
    """Reads a checkpoint folder, a block at a time, and checks each file against the manifest as it is read.

    Attributes:
        folder: where it lies.
        manifest: `manifest.json`.
        blocks: module path of the list of blocks (`model.layers`).
        depth: how many there are.
        layers: shape [out, in] of each linear in the blocks, by full name, in the order of the model.
        transposed: those whose weights lie in the files as [in, out] (GPT-2's); whoever reads sees [out, in].

    Raises:
        Problem: no manifest there, or one that is not JSON.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise Problem(str(folder / MANIFEST), "no checkpoint here", "run the stage that makes it first") from None
        except json.JSONDecodeError as error:
            raise Problem(str(folder / MANIFEST), f"not JSON: {error}") from None
        self.blocks: str = self.manifest["blocks"]
        self.depth: int = self.manifest["depth"]
        self.layers: dict[str, list[int]] = self.manifest["layers"]
        self.transposed = frozenset(self.manifest.get("transposed", ()))

    def outer(self) -> dict[str, Tensor]:
        """Tensors outside the blocks, by full name."""
        return self._read(OUTER)

    def block(self, index: int) -> dict[str, Tensor]:
        """Tensors of one block, by full name, in the type in which they are stored."""
        return turned(self._read(block_file(index)), self.transposed)

    def masks(self) -> dict[str, Tensor]:
        """Packed masks uint8 [out, ceil(in / 8)] by layer name; empty for a dense checkpoint."""
        return self._read(MASKS) if MASKS in self.manifest["files"] else {}

    def scales(self) -> dict[str, Tensor]:
        """Scales [out, in / group_size] of the grid on which pruning left the weights, by layer; empty if on none."""
        return self._read(SCALES) if SCALES in self.manifest["files"] else {}

    def block_masks(self, index: int, packed: dict[str, Tensor]) -> dict[str, Tensor]:
        """Masks bool [out, in] of one block's layers, out of what `masks()` gave."""
        prefix = f"{self.blocks}.{index}."
        return {
            name: masks.unpack(bits, self.layers[name][1]) for name, bits in packed.items() if name.startswith(prefix)
        }

    def config(self) -> dict[str, Any]:
        config: dict[str, Any] = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        return config

    def _read(self, name: str) -> dict[str, Tensor]:
        return read_tensors(self.folder / name, self.manifest["files"].get(name))


class CheckpointWriter:
    """Writes a checkpoint block by block; nothing counts until `finish` has written the manifest.

    Args:
        folder: made if need be; blocks that are there from a killed run stay.
        template: a folder whose config, tokenizer and other small files are taken over; its adapter is not, as it
            belongs to the weights that it was trained on.
        transposed: layers whose weights the files are to hold as [in, out]; None: as the template's manifest says.
    """

    def __init__(self, folder: Path, template: Path, transposed: Iterable[str] | None = None) -> None:
        self.folder = folder
        if transposed is None and (template / MANIFEST).exists():
            transposed = Checkpoint(template).transposed
        self.transposed = frozenset(transposed or ())
        folder.mkdir(parents=True, exist_ok=True)
        for file in sorted(template.iterdir()):
            if file.is_file() and file.suffix != ".safetensors" and file.name not in (INDEX, MANIFEST):
                shutil.copyfile(file, folder / file.name)

    def write_outer(self, tensors: dict[str, Tensor]) -> None:
        write_tensors(self.folder / OUTER, tensors)

    def write_block(
        self,
        index: int,
        tensors: dict[str, Tensor],
        keep: dict[str, Tensor] | None = None,
        scales: dict[str, Tensor] | None = None,
    ) -> None:
        """Writes one block.

        Args:
            tensors: by full name, in the type in which they are stored.
            keep: masks bool [out, in] by layer name. Where the block holds the plain weight of such a layer
                it is proven here; a packed weight is proven by who packs it.
            scales: of the grid on which the weights of these layers lie.
        """
        for layer, mask in (keep or {}).items():
            if (weight := tensors.get(f"{layer}.weight")) is not None:
                masks.prove(layer, weight, mask)
        if keep:
            write_tensors(self._part(MASKS, index), {layer: masks.pack(mask) for layer, mask in keep.items()})
        if scales:
            write_tensors(self._part(SCALES, index), scales)
        write_tensors(self.folder / block_file(index), turned(tensors, self.transposed))

    def link_block(self, source: Checkpoint, index: int, keep: dict[str, Tensor]) -> None:
        """Takes over a block of another checkpoint unchanged, with its masks bool [out, in] by layer name."""
        if keep:
            write_tensors(self._part(MASKS, index), {layer: masks.pack(mask) for layer, mask in keep.items()})
        self.link(source, block_file(index))

    def link(self, source: Checkpoint, name: str) -> None:
        """Takes over a file of another checkpoint unchanged: a hard link where the disk can, else a copy."""
        target = self.folder / name
        target.parent.mkdir(exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            os.link(source.folder / name, target)
        except OSError:
            shutil.copyfile(source.folder / name, target)

    def link_adapter(self, source: Checkpoint) -> None:
        """Takes over the adapter of another checkpoint unchanged, if it has one."""
        for name in [name for name in source.manifest["files"] if name.startswith(f"{ADAPTER}/")]:
            self.link(source, name)

    def finish(self, depth: int, record: dict[str, Any], config: dict[str, Any] | None = None) -> None:
        """Joins masks and scales, writes config, index and, last, the manifest with every file's hash.

        Args:
            record: what else goes into the manifest; needs `blocks` and `layers`.
            config: replaces config.json when given.
        """
        for name in (MASKS, SCALES):
            parts = [self._part(name, index) for index in range(depth) if self._part(name, index).exists()]
            if parts:
                join_tensors(self.folder / name, parts)
        if config is not None:
            write_text(self.folder / "config.json", json.dumps(config, indent=2) + "\n")
        weight_map, size = {}, 0
        for name in [OUTER, *(block_file(index) for index in range(depth))]:
            for tensor_name, entry in sorted(read_header(self.folder / name)[0].items()):
                weight_map[tensor_name] = name
                size += entry["data_offsets"][1] - entry["data_offsets"][0]
        index_file = {"metadata": {"total_size": size}, "weight_map": weight_map}
        write_text(self.folder / INDEX, json.dumps(index_file, indent=2) + "\n")
        files = {
            file.relative_to(self.folder).as_posix(): sha256(file)
            for file in sorted(self.folder.rglob("*"))
            if file.is_file() and not file.name.startswith(MANIFEST)
        }
        transposed = {"transposed": sorted(self.transposed)} if self.transposed else {}
        manifest = record | transposed | {"depth": depth, "files": files}
        write_text(self.folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")

    def _part(self, name: str, index: int) -> Path:
        # Beside the folder, so that an interrupted run leaves no stranger among the checkpoint's files.
        return self.folder.with_name(f"{self.folder.name}-{index:05d}-{name}")


def turned(tensors: dict[str, Tensor], transposed: frozenset[str]) -> dict[str, Tensor]:
    """The weights of some layers [out, in] as [in, out], or back."""
    if not transposed:
        return tensors
    return {
        name: tensor.T.contiguous() if name.removesuffix(".weight") in transposed and tensor.ndim == 2 else tensor
        for name, tensor in tensors.items()
    }
