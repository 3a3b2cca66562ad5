"""What a layer's weight becomes at each width that is tried.

On the spot: the nearest points of a symmetric grid without clipping. A better quantiser errs otherwise, not only less:
GPTQ moves weights further than to their nearest points, so that the layer's output moves less. `try_widths` rounds
every layer at every width as the quantiser does it in earnest, and keeps what comes out for measures to look up.

Costs can be taken around the model that most layers will be like in the end: with `around` bits, text and measures
meet every layer rounded to so many, a part that is tried at b bits is put to b from there, and its cost at `around`
bits is 0. Such costs tell plans of one budget apart; they do not add up to what the plan costs from the dense model on.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from compression.core.checkpoint import Checkpoint, CheckpointWriter, block_file
from compression.core.files import read_tensors
from compression.core.journal import Journal
from compression.quantization import gptq, rtn
from compression.quantization.bits import check_group_size
from compression.quantization.grid import fit_grid
from compression.quantization.method import Quantized
from compression.quantization.method import Settings as GridSettings
from compression.quantization.packed import pack, unpack
from compression.rewriting import Rewritten, rewrite

KEY = "sensitivity.group_size"
QUANTISERS: Mapping[str, ModuleType] = {"nearest": rtn, "gptq": gptq}


@dataclass(frozen=True)
class Tried:
    """The layers of a model at several widths, as `try_widths` has left them in a folder.

    Attributes:
        source: the model whose layers were rounded.
        around: bits of all layers that are not tried; None: they stay as they are.
    """

    source: Checkpoint
    folder: Path
    around: int | None = None

    def weight(self, layer: str, bits: int) -> Tensor:
        """Q_b(W) [out, in] of a layer, in the type in which W is stored."""
        index = int(layer.removeprefix(f"{self.source.blocks}.").split(".")[0])
        codes, grid = unpack(_trial(layer, bits), _read(self.folder / block_file(index)), bits)
        return grid.values(codes)

    def block(self, index: int) -> dict[str, Tensor]:
        """Tensors of one block of the model around which layers are tried."""
        tensors, bits = self.source.block(index), self.around
        if bits is None:
            return tensors
        return tensors | {
            f"{layer}.weight": self.weight(layer, bits) for layer in self.source.layers if f"{layer}.weight" in tensors
        }


def try_widths(
    rounding: str,
    source: Checkpoint,
    folder: Path,
    journal: Journal,
    ids: Tensor,
    widths: tuple[int, ...],
    group_size: int,
    around: int | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Tried:
    """Rounds every layer at every width, in one walk, going on behind the journal's last block.

    Args:
        rounding: `nearest`; `gptq`: with clipping, the loudest inputs first. On symmetric grids.
        folder: where the layers go, packed: so many bits a weight as the widths are together.
        ids: calibration tokens int64 [N, T]; not looked at by `nearest`.
        widths: bits, each 2 to 8.
        around: one of the widths, with which the text goes on from layer to layer; None: it goes on with W itself.
        dtype: type of the forward pass.

    Raises:
        Problem: the group size does not divide a layer's number of inputs; weights or inputs are not finite.
    """
    check_group_size(source.layers, group_size, KEY)
    method, careful = QUANTISERS[rounding], rounding != "nearest"
    settings = GridSettings(group_size, clip=careful, order="activation" if careful else "natural")

    def tried(layer: str, weight: Tensor, statistic: Any, _: Tensor | None) -> Rewritten:
        packed: dict[str, Tensor] = {}
        going = weight
        for bits in widths:
            done: Quantized = method.quantize(weight, bits, settings, statistic)
            parts = pack(_trial(layer, bits), done.codes.cpu(), done.grid.to("cpu"))
            packed |= {name.removeprefix(f"{layer}."): part for name, part in parts.items()}
            if bits == around:
                going = done.grid.values(done.codes)
        return Rewritten(going, packed)

    writer = CheckpointWriter(folder, source.folder)
    rewrite("round", source, writer, journal, method.STATISTIC, tried, ids, device, dtype, lambda _: {})
    return Tried(source, folder, around)


def rounded(layer: str, weight: Tensor, bits: int, group_size: int, tried: Tried | None = None) -> Tensor:
    """Q_b(W) [out, in] of a layer, in the type and on the device of its present weight W [out, in].

    Args:
        tried: where it is looked up; None: it is W rounded to nearest.

    Raises:
        Problem: the group size does not divide the layer's number of inputs.
    """
    if tried is not None:
        return tried.weight(layer, bits).to(weight)
    check_group_size({layer: list(weight.shape)}, group_size, KEY)
    return fit_grid(weight, bits, group_size).nearest(weight)


def cost(bits: int) -> str:
    """Name of the column that says what rounding to so many bits costs."""
    return f"cost_{bits}"


def _trial(layer: str, bits: int) -> str:
    return f"{layer}.tried_{bits}"


@lru_cache(maxsize=1)
def _read(file: Path) -> dict[str, Tensor]:
    return read_tensors(file)
