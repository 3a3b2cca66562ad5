"""What hangs together across the layers of a block, so that it goes together and the block gets smaller.

    units   a hidden unit of the MLP: its row in each layer that writes it (gate and up), its column in the one that
            reads it (down)
    heads   a key/value head and the heads that share it: rows of q, k and v, columns of o

A structure is read in one place, so removing it costs what its columns in the reader cost; the rows that write it then
go for nothing, and their biases with them.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from compression.core.checkpoint import Checkpoint
from compression.core.errors import Problem
from compression.surgeon.widths import (
    Shapes,
    built,
    head_width,
    heads,
    is_taken,
    key_value_heads,
    read_config,
    with_groups,
    with_units,
)

Kind = Literal["units", "heads"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Key = tuple[int, Kind]  # block, kind

# Writers and reader by the last parts of their names, behind what all of them begin with.
LAYOUTS: dict[Kind, tuple[tuple[tuple[str, ...], str], ...]] = {
    "units": (
        (("gate_proj", "up_proj"), "down_proj"),  # Llama, Mistral, Qwen, Gemma
        (("fc1",), "fc2"),  # OPT
        (("intermediate.dense",), "output.dense"),  # BERT
        (("dense_h_to_4h",), "dense_4h_to_h"),  # GPT-NeoX
        (("c_fc",), "c_proj"),  # GPT-2
    ),
    "heads": (
        (("q_proj", "k_proj", "v_proj"), "o_proj"),
        (("q_proj", "k_proj", "v_proj"), "out_proj"),
        (("self.query", "self.key", "self.value"), "output.dense"),
    ),
}
# One matrix for several writers.
FUSED: dict[Kind, tuple[str, ...]] = {
    "units": ("gate_up_proj",),
    "heads": ("query_key_value", "qkv_proj", "qkv", "c_attn", "Wqkv", "W_pack"),
}


@dataclass(frozen=True)
class Structure:
    """The structures of one kind in one block; there are n.

    Attributes:
        reader: layer whose columns they are, by full name.
        writers: layers whose rows they are.
        columns: int64 [n, size], those of each structure in the reader.
        rows: int64 [n, size_w] by writer.
        weights: that one structure has in all these layers; biases are not counted.
    """

    kind: Kind
    reader: str
    writers: tuple[str, ...]
    columns: Tensor
    rows: Mapping[str, Tensor]
    weights: int

    @property
    def number(self) -> int:
        return len(self.columns)


def find_structures(source: Checkpoint, kinds: Collection[Kind]) -> dict[Key, Structure]:
    """The structures of these kinds in every block.

    Raises:
        Problem: the blocks do not have them, or in a form that cannot get smaller: one matrix for several writers,
            blocks of different widths, or a model that transformers does not build with fewer.
    """
    config, settings = read_config(source.folder), source.config()
    whole = built(settings)
    found: dict[Key, Structure] = {}
    for kind in kinds:
        for index in range(source.depth):
            found[index, kind] = _structure(kind, f"{source.blocks}.{index}", source.layers, config)
        own = [found[index, kind] for index in range(source.depth)]
        if len({structure.number for structure in own}) > 1:
            raise Problem(source.blocks, f"not every block has as many {kind}", "valid: blocks of one width")
        for fewer in counts(config, own[0], 1)[:-1][:1]:
            smaller = settings | resized(config, own[0], fewer)
            if built(smaller) != resized_shapes(whole, {structure.reader: (structure, fewer) for structure in own}):
                raise Problem(
                    source.blocks,
                    f"{settings['architectures'][0]} cannot be built with fewer {kind}: their width hangs on their "
                    "number, or other tensors do",
                    _valid(kind),
                )
    return dict(sorted(found.items(), key=lambda item: item[0][0]))


def counts(config: Any, structure: Structure, multiple: int) -> list[int]:
    """How many structures may stay in each block for transformers to build the model, all of them last.

    Args:
        config: as `read_config` gives it.
        multiple: of units; all that there are may stay even if they are no multiple.
    """
    if structure.kind == "units":
        return [*range(multiple, structure.number, multiple), structure.number]
    fewer = range(1, structure.number)
    return [*(n for n in fewer if is_taken(config, resized(config, structure, n))), structure.number]


def resized(config: Any, structure: Structure, count: int) -> dict[str, Any]:
    """What changes in config.json if `count` structures stay in each block."""
    if structure.kind == "units":
        return with_units(config, structure.number, count)
    return with_groups(config, count)


def resized_shapes(whole: Shapes, left: Mapping[str, tuple[Structure, int]]) -> Shapes:
    """The shapes of all tensors where of some structures, by reader, no more than so many are left."""
    shapes = dict(whole)
    for structure, count in left.values():
        weight = f"{structure.reader}.weight"
        shapes[weight] = (whole[weight][0], count * structure.columns.shape[1])
        for layer, rows in structure.rows.items():
            for name in _row_tensors(layer, whole):
                shapes[name] = (count * rows.shape[1], *whole[name][1:])
    return shapes


def remove(
    tensors: Mapping[str, Tensor], structure: Structure, removed: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Takes structures out of the layers that write them, and says what that is in masks.

    Args:
        tensors: of the block, by full name.
        removed: int64, which structures go.

    Returns:
        the block's tensors, the writers' rows and biases of these structures zero in them; the reader is as it was, for
        an update to take its columns out. And masks bool [out, in] of writers and reader by layer, False where a weight
        belongs to one of these structures.
    """
    changed, masks = dict(tensors), {}
    for layer, rows in structure.rows.items():
        gone = rows[removed].flatten()
        for name in _row_tensors(layer, tensors):
            changed[name] = tensors[name].index_fill(0, gone.to(tensors[name].device), 0)
        masks[layer] = torch.ones(tensors[f"{layer}.weight"].shape, dtype=torch.bool).index_fill(0, gone, False)
    columns = torch.ones(tensors[f"{structure.reader}.weight"].shape, dtype=torch.bool)
    masks[structure.reader] = columns.index_fill(1, structure.columns[removed].flatten(), False)
    return changed, masks


def left_out(structure: Structure, kept: Tensor) -> Tensor:
    """int64, ascending: the structures that are not among `kept`."""
    gone = torch.ones(structure.number, dtype=torch.bool)
    gone[kept] = False
    return gone.nonzero().flatten()


def _structure(kind: Kind, block: str, layers: Mapping[str, Sequence[int]], config: Any) -> Structure:
    names = [name for name in layers if name.startswith(f"{block}.")]
    writers, reader = _layout(kind, block, names)
    widths = [layers[name][0] for name in writers]
    wide = layers[reader][1]
    if kind == "units":
        number, sizes, size = wide, [1] * len(writers), 1
    else:
        number, head = key_value_heads(config), head_width(config)
        size = heads(config) // number * head
        sizes = [size if name == writers[0] else head for name in writers]
    if [number * own for own in sizes] != widths or number * size != wide:
        raise Problem(
            block,
            f"{', '.join(writers)} do not write what {reader} reads, {number} {kind} in {wide} columns",
            _valid(kind),
        )

    def places(size: int) -> Tensor:
        return torch.arange(number * size).view(number, size)

    rows = {layer: places(own) for layer, own in zip(writers, sizes, strict=True)}
    inputs = sum(own * layers[layer][1] for layer, own in zip(writers, sizes, strict=True))
    return Structure(kind, reader, tuple(writers), places(size), rows, size * layers[reader][0] + inputs)


def _layout(kind: Kind, block: str, names: Sequence[str]) -> tuple[list[str], str]:
    """Full names of the writers and of the reader."""
    for writers, reader in LAYOUTS[kind]:
        stems = [name.removesuffix(writers[0]) for name in names if name.endswith(f".{writers[0]}")]
        for stem in stems[:1]:
            found = [stem + writer for writer in writers]
            if len(stems) == 1 and stem + reader in names and set(found) <= set(names):
                return found, stem + reader
    fused = [name for name in names if name.rpartition(".")[2] in FUSED[kind]]
    if fused:
        what = "q, k and v in one matrix" if kind == "heads" else "gate and up in one matrix"
        raise Problem(fused[0], f"{kind} cannot go: it holds {what}", _valid(kind))
    known = "; ".join(f"{', '.join(writers)} and {reader}" for writers, reader in LAYOUTS[kind])
    raise Problem(block, f"no {kind} found in a block of this layout", f"known: {known}")


def _row_tensors(layer: str, names: Collection[str]) -> list[str]:
    return [name for name in (f"{layer}.weight", f"{layer}.bias") if name in names]


def _valid(kind: Kind) -> str:
    if kind == "units":
        return "valid: an MLP of gate, up and down or of two layers, as wide as config.json says; or elements, rows"
    return "valid: units; or heads of a model whose config.json says how wide a head is (Llama, Mistral, Qwen, Gemma)"
