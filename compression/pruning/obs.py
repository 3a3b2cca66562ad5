"""The OBS sweep: columns from left to right, each one's loss made up for in the columns behind it.

Symbols as in SparseGPT (arXiv 2301.00774, section 3): H = X^T X / tokens + lambda I, U upper triangular with
H^-1 = U^T U, B columns a block. What a column j loses, e_j = (w_j - q_j) / U_jj, is taken off every later column k as
e_j U_jk. Within a block this goes by a few columns at a time, behind the block by one product: nearly all operations
are matrix products, though every column sees all updates of those before it.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from compression.pruning.method import Pruned, Settings
from compression.pruning.pattern import NofM, Pattern, Unstructured
from compression.pruning.select import keep_highest
from compression.quantization.grid import Grid, spanning_scale
from compression.statistics import Gram

STRIP = 16  # columns that are updated one by one before a product updates the rest of their block


def sweep(
    weight: Tensor,
    statistic: Gram,
    pattern: Pattern,
    settings: Settings,
    score: Callable[[Tensor, slice], Tensor],
    keep: Tensor | None = None,
) -> Pruned:
    """Prunes W column by column.

    Args:
        weight: W [out, in], any floating type.
        statistic: of the layer's inputs.
        pattern: what the mask has to satisfy. Chosen in blocks of columns, an unstructured mask drops the same
            share of each block, over all rows or, with scope `row`, of each row.
        settings: damping, columns; bits and group_size where kept weights are to be rounded to a grid as well.
        score: (values [out, c] as they are by then, which inputs) -> [out, c]; the lowest go.
        keep: the mask, where it is chosen beforehand.

    Returns:
        the layer, with notes: `damping` that was needed, and `error`, the share ||X (W - W')||^2 / ||X W||^2.
    """
    factor = statistic.factor(settings.damping)
    upper, (rows, width) = factor.upper, weight.shape
    values = weight.float().T.contiguous()  # [in, out]: a column of W is a row here, and lies in one piece
    values[factor.dead] = 0
    kept = torch.ones_like(values, dtype=torch.bool) if keep is None else keep.T.contiguous()
    group = pattern.of if isinstance(pattern, NofM) else settings.columns
    scales: list[Tensor] = []
    strip = -(-STRIP // group) * group if isinstance(pattern, NofM) else STRIP
    block = -(-settings.columns // strip) * strip if isinstance(pattern, NofM) else settings.columns
    owed = _owed(pattern, rows, width, group)

    for start in range(0, width, block):
        end = min(start + block, width)
        errors = torch.empty(end - start, rows, device=values.device)
        for first in range(start, end, strip):
            last = min(first + strip, end)
            for column in range(first, last):
                if keep is None and column % group == 0:
                    inputs = slice(column, min(column + group, width))
                    part = score(values[inputs].T, inputs)
                    kept[inputs] = keep_highest(part, _share(pattern, part, owed, column // group)).T
                if settings.bits and column % settings.group_size == 0:
                    inputs = slice(column, column + settings.group_size)
                    largest = (values[inputs] * kept[inputs]).abs().amax(0)
                    scales.append(spanning_scale(largest, settings.bits, weight.dtype))
                new = values[column] * kept[column]
                if settings.bits:
                    grid = Grid(settings.bits, scales[-1][:, None])
                    new = grid.values(grid.codes(new[:, None]))[:, 0].float()
                error = (values[column] - new).div_(upper[column, column])
                values[column + 1 : last].addr_(upper[column, column + 1 : last], error, alpha=-1)
                values[column], errors[column - start] = new, error
            done = errors[first - start : last - start]
            values[last:end].addmm_(upper[first:last, last:end].T, done, alpha=-1)
        values[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)

    pruned = values.T.contiguous().to(weight.dtype)
    notes = {"damping": factor.damping, "error": statistic.error(weight, pruned)}
    return Pruned(
        pruned, kept.T.contiguous(), notes, Grid(settings.bits, torch.stack(scales, 1)) if settings.bits else None
    )


def _owed(pattern: Pattern, rows: int, width: int, group: int) -> list[int]:
    """How many weights the blocks of columns up to each one drop in all: exact at the end."""
    total = round(pattern.sparsity * rows * width)
    return [total * min(start + group, width) // width for start in range(0, width, group)]


def _share(pattern: Pattern, part: Tensor, owed: list[int], number: int) -> Pattern:
    """The pattern within block `number` of columns."""
    if isinstance(pattern, NofM):
        return pattern
    count = owed[number] - (owed[number - 1] if number else 0)
    return Unstructured(count / part.numel(), "row" if pattern.scope == "row" else "layer")
