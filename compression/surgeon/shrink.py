"""A checkpoint that is physically smaller: what a mask removed in whole structures is cut out of every tensor.

Where blocks keep different numbers of structures, all are padded with zeros to the widest, as transformers builds the
known families with one width for all blocks. The mask marks the padding: it holds True for what a structure that stays
is made of, so that later stages find their way as after any pruning, and the padding stays zero.

    structures.safetensors    `block/kind`: int32 indices, in the model before, of what stays
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compression.core.checkpoint import Checkpoint, CheckpointWriter
from compression.core.errors import Problem
from compression.core.files import write_tensors
from compression.surgeon.structures import Key, Kind, Structure, resized, resized_shapes
from compression.surgeon.widths import built, read_config

STRUCTURES = "structures.safetensors"


@dataclass(frozen=True)
class Shrunk:
    """What CheckpointWriter.finish has to be told.

    Attributes:
        config: the new config.json.
        layers: shape [out, in] of each linear in the blocks, for the manifest.
        widths: structures of each kind that every block has now, padding among them.
        padding: weights of the linears in the blocks that are there only to make all blocks as wide as the widest.
    """

    config: dict[str, Any]
    layers: dict[str, list[int]]
    widths: dict[Kind, int]
    padding: int


def shrink(
    source: Checkpoint,
    writer: CheckpointWriter,
    structures: Mapping[Key, Structure],
    kept: Mapping[Key, Tensor],
    counts: Mapping[Kind, Sequence[int]],
) -> Shrunk:
    """Writes the blocks of `source`, whose other structures are zero, without them; one block is in memory.

    Args:
        source: plain weights, in full precision.
        structures: of every block, as find_structures gives them.
        kept: indices int64 of the structures that stay, ascending; where none are named, all stay.
        counts: how many of a kind every block may have, ascending; padding goes to the next.

    Raises:
        Problem: weights on a grid, or a model that transformers would not build in these shapes.
    """
    refuse_grids(source)
    stay = {key: kept.get(key, torch.arange(structure.number)) for key, structure in structures.items()}
    widths: dict[Kind, int] = {}
    for kind in dict.fromkeys(kind for _, kind in structures):
        widest = max(len(indices) for key, indices in stay.items() if key[1] == kind)
        widths[kind] = next(count for count in counts[kind] if count >= widest)
    config = _config(source, structures, widths)

    packed, layers, padding = source.masks(), dict(source.layers), 0
    for index in range(source.depth):
        tensors, masks = source.block(index), source.block_masks(index, packed)
        prefix = f"{source.blocks}.{index}."
        masks |= {
            layer: torch.ones(shape, dtype=torch.bool)
            for layer, shape in layers.items()
            if layer.startswith(prefix) and layer not in masks
        }
        before = sum(mask.numel() for mask in masks.values())
        for key, structure in structures.items():
            if key[0] == index:
                tensors |= _cut(tensors, structure, stay[key], widths[key[1]])
                weights = {f"{layer}.weight": mask for layer, mask in masks.items()}
                cut = _cut(weights, structure, stay[key], widths[key[1]])
                masks |= {name.removesuffix(".weight"): mask for name, mask in cut.items()}
                before -= (structure.number - len(stay[key])) * structure.weights
        layers |= {layer: list(mask.shape) for layer, mask in masks.items()}
        padding += sum(mask.numel() for mask in masks.values()) - before
        writer.write_block(index, tensors, masks)
    writer.write_outer(source.outer())
    indices = {f"{index}/{kind}": places.to(torch.int32) for (index, kind), places in stay.items()}
    write_tensors(writer.folder / STRUCTURES, indices)
    return Shrunk(config, layers, widths, padding)


def refuse_grids(source: Checkpoint) -> None:
    """Raises Problem where weights lie on a grid, whose groups would be torn."""
    if source.scales() or "quantization" in source.manifest:
        raise Problem(str(source.folder), "its weights lie on a grid, which cannot be cut", "prune before quantising")


def _config(source: Checkpoint, structures: Mapping[Key, Structure], widths: Mapping[Kind, int]) -> dict[str, Any]:
    """config.json of the smaller model; transformers is asked whether it builds just that of it."""
    old, settings = read_config(source.folder), source.config()
    changed = settings.copy()
    for kind, width in widths.items():
        changed |= resized(old, structures[0, kind], width)
    left = {structure.reader: (structure, widths[kind]) for (_, kind), structure in structures.items()}
    if built(changed) != resized_shapes(built(settings), left):
        raise Problem(str(source.folder / "config.json"), f"transformers does not build this model with {dict(widths)}")
    return changed


def _cut(tensors: Mapping[str, Tensor], structure: Structure, stay: Tensor, width: int) -> dict[str, Tensor]:
    """Weights and biases of a structure's layers, of what stays only, and zeros (False) behind it up to `width`."""
    padding = width - len(stay)
    cut: dict[str, Tensor] = {}
    for layer, rows in structure.rows.items():
        places = rows[stay].flatten()
        for name in (f"{layer}.weight", f"{layer}.bias"):
            if name in tensors:
                tensor = tensors[name][places]
                cut[name] = F.pad(tensor, (0, 0) * (tensor.ndim - 1) + (0, padding * rows.shape[1]))
    name = f"{structure.reader}.weight"
    columns = tensors[name][:, structure.columns[stay].flatten()]
    cut[name] = F.pad(columns, (0, padding * structure.columns.shape[1]))
    return cut
