"""Linear layers that multiply by codes as they are, with the kernels that torch has for a CPU.

A product of few rows waits for memory, and codes are fewer bytes than weights. Of a grid's values s (q - z) the
kernels take:

    int4        q of up to 4 bits, groups of 32, 64, 128 or 256 inputs or of multiples of these
    int4 twice  q of 5 to 8 bits as 16 h + l, two digits of 4 bits, the same groups
    int8        q of 5 to 8 bits, z = 0, a scale a row or one for the matrix

Inputs are bfloat16. For many rows the kernels are slower than bfloat16 products; there a strip of weights at a time is
made from the codes and multiplied as usual. torch's dynamic kernels are left out: they round the inputs, too, which is
another model than the one that ships.
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn

from compression.core.checkpoint import Checkpoint
from compression.quantization.grid import Grid
from compression.quantization.packed import rounded_layers, unpack

NONE = "none"  # the kernel of a layer that none fits

GROUPS = (256, 128, 64, 32)  # inputs that share a scale in the int4 kernel
OUTPUTS = 64  # the int4 kernel packs so many rows together
INPUTS = 32  # the int8 kernel reads past the end of rows that are no multiple of its vectors
FEW_ROWS = 64  # times digits: up to here the int4 kernel is faster than strips and bfloat16 products
FEW_ROWS_INT8 = 16  # and the int8 kernel
STRIP = 2**21  # weights of a strip


def use_kernels(model: nn.Module, checkpoint: Checkpoint) -> dict[str, str]:
    """Puts kernels in the place of a model's linear layers that stand in its checkpoint as codes.

    Args:
        model: as transformers loads the checkpoint, before its first pass, which would unpack what is packed. Layers
            that get a kernel keep no weight beside their codes.

    Returns:
        the kernel by layer, NONE for those that compute with their plain weight.
    """
    able = next(model.parameters()).device.type == "cpu" and getattr(model, "dtype", None) == torch.bfloat16
    bits: dict[str, int] = checkpoint.manifest.get("quantization", {}).get("bits", {})
    chosen = {}
    for part in (-1, *range(checkpoint.depth)):
        tensors = checkpoint.outer() if part < 0 else checkpoint.block(part)
        for layer in rounded_layers(tensors):
            module = model.get_submodule(layer)
            if not isinstance(module, nn.Linear):
                continue
            codes, grid = unpack(layer, tensors, bits[layer])
            chosen[layer] = kernel_for(codes.shape, grid) if able else NONE
            if chosen[layer] != NONE:
                linear = Int8Linear if chosen[layer] == "int8" else Int4Linear
                model.set_submodule(layer, linear(codes, grid, module.bias))
    return chosen


def kernel_for(shape: Sequence[int], grid: Grid) -> str:
    """The kernel that takes codes of a shape [out, in] on a grid: `int4`, `int4 twice`, `int8` or NONE."""
    outputs, inputs = shape
    if grid.bits > 4 and grid.zero is None and grid.scale.shape[1] == 1 and inputs % INPUTS == 0:
        return "int8"
    if outputs % OUTPUTS or _shared(inputs, grid) is None:
        return NONE
    return "int4" if grid.bits <= 4 else "int4 twice"


class Int4Linear(nn.Module):
    """y = x W^T + b from codes of 2 to 8 bits, for inference.

    The kernel has s (d - 8) + t for a digit d of 0 .. 15, s and t in bfloat16. One digit: d = q + 8, t = -s z. Two
    stand side by side, and the inputs twice: d = h + 8 on steps of 16 s with t = 0, and d = l with t = 8 s - s z.
    """

    packed: Tensor  # uint8 [out, digits in / 2], in an order of the processor's
    steps: Tensor  # s and t, bfloat16 [digits in / group, out, 2]
    bias: Tensor | None

    def __init__(self, codes: Tensor, grid: Grid, bias: Tensor | None = None) -> None:
        """Packs codes int8 [out, in] on a grid that `kernel_for` takes, and a bias bfloat16 [out]."""
        super().__init__()
        self.out_features, self.in_features = codes.shape
        self.group_size = _shared(self.in_features, grid) or 0
        self.digits = 1 if grid.bits <= 4 else 2
        scale = self._spread(grid.scale)
        shift = torch.zeros_like(scale) if grid.zero is None else -scale * self._spread(grid.zero)
        if self.digits == 1:
            number, scales, shifts = codes + 8, scale, shift
        else:
            number = torch.cat([(codes >> 4) + 8, codes & 15], 1)
            scales, shifts = torch.cat([16 * scale, scale]), torch.cat([torch.zeros_like(shift), 8 * scale + shift])
        self.register_buffer("packed", torch.ops.aten._convert_weight_to_int4pack_for_cpu(number.int(), 1))
        self.register_buffer("steps", torch.stack([scales, shifts], -1).bfloat16())
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """x bfloat16 [..., in] to y bfloat16 [..., out]."""
        rows = x.reshape(-1, self.in_features)
        if self.digits * len(rows) <= FEW_ROWS or not _tile():
            rows = rows.repeat(1, 2) if self.digits == 2 else rows.contiguous()
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.packed, self.group_size, self.steps)
        else:
            size = OUTPUTS * max(1, STRIP // (OUTPUTS * self.in_features))
            strips = zip(self.packed.split(size), self.steps.split(size, 1), strict=True)
            y = torch.cat([rows @ self._weights(packed, steps) for packed, steps in strips], -1)
        if self.bias is not None:
            y += self.bias
        return y.view(*x.shape[:-1], self.out_features)

    def _weights(self, packed: Tensor, steps: Tensor) -> Tensor:
        """The weights of some outputs, bfloat16 [in, some]. Digits make a code again before it is scaled."""
        tiles = packed.view(-1, self.digits, self.in_features, _tile() // 2)
        digits = torch.cat([tiles & 15, tiles >> 4], -1).view(torch.int8)
        codes = digits[:, 0].sub_(8)
        scale, shift = steps[-self.in_features // self.group_size :].unbind(-1)
        if self.digits == 2:
            codes = codes * 16 + digits[:, 1]
            shift = shift - 8 * scale
        scale, shift = (one.view(len(scale), len(tiles), 1, -1).transpose(0, 1).contiguous() for one in (scale, shift))
        weights = codes.bfloat16().view(len(tiles), -1, self.group_size, _tile())
        torch.addcmul(shift, weights, scale, out=weights)
        return weights.view(len(tiles), self.in_features, -1).transpose(0, 1).reshape(self.in_features, -1)

    def _spread(self, per_group: Tensor) -> Tensor:
        """What a grid has for its groups as float32 for the kernel's: [in / group, out]."""
        groups = self.in_features // self.group_size
        spread = per_group.bfloat16().float().repeat_interleave(groups // per_group.shape[1], 1)
        return spread.expand(self.out_features, -1).t()


class Int8Linear(nn.Module):
    """y = s (x q^T) + b from codes of up to 8 bits with a scale an output, for inference."""

    codes: Tensor  # q, int8 [out, in]
    scale: Tensor  # s, bfloat16 [out]
    bias: Tensor | None

    def __init__(self, codes: Tensor, grid: Grid, bias: Tensor | None = None) -> None:
        """Keeps codes int8 [out, in] on a grid that `kernel_for` takes, and a bias bfloat16 [out]."""
        super().__init__()
        self.out_features, self.in_features = codes.shape
        self.register_buffer("codes", codes.contiguous())
        self.register_buffer("scale", grid.scale[:, 0].bfloat16().expand(self.out_features).contiguous())
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """x bfloat16 [..., in] to y bfloat16 [..., out]."""
        rows = x.reshape(-1, self.in_features)
        if len(rows) <= FEW_ROWS_INT8:
            y = torch.ops.aten._weight_int8pack_mm(rows.contiguous(), self.codes, self.scale)
        else:
            size = max(1, STRIP // self.in_features)
            y = torch.cat([rows @ codes.bfloat16().t() for codes in self.codes.split(size)], -1) * self.scale
        if self.bias is not None:
            y += self.bias
        return y.view(*x.shape[:-1], self.out_features)


def _shared(inputs: int, grid: Grid) -> int | None:
    """The most inputs that can share a scale in the int4 kernel; None where no number of them fits the grid."""
    return next((size for size in GROUPS if inputs // grid.scale.shape[1] % size == 0), None)


@cache
def _tile() -> int:
    """How many outputs this processor's packing takes together, 0 where it packs in a way that is not known here.

    Known is: of each tile's 2 n outputs, input by input, n bytes that hold output i below and output n + i above.
    """
    digits = torch.arange(2 * OUTPUTS * INPUTS, dtype=torch.int32).mul_(2654435761 % 2**16).view(2 * OUTPUTS, INPUTS)
    digits = (digits >> 8) % 16
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(digits, 1)
    for tile in (OUTPUTS, OUTPUTS // 2):
        tiles = packed.view(-1, INPUTS, tile // 2)
        if torch.cat([tiles & 15, tiles >> 4], -1).transpose(1, 2).reshape(digits.shape).equal(digits):
            return tile
    return 0
