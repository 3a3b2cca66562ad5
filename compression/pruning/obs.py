"""Pruning by the OBS sweep: what a dropped weight was worth is made up for in the columns behind it."""

from collections.abc import Callable
from math import gcd

import torch
from torch import Tensor

from compression.core.device import pick_dtype
from compression.core.errors import Problem
from compression.pruning.method import Pruned, Settings
from compression.pruning.pattern import NofM, Pattern, Unstructured
from compression.pruning.refit import refit
from compression.pruning.select import keep_highest
from compression.quantization.grid import Grid, spanning_scale
from compression.statistics import Gram
from compression.sweep import STRIP, sweep


def prune_by_sweep(
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
        settings: damping, columns; refit; bits and group_size where kept weights are to be rounded to a grid as well.
        score: (values [out, c] as they are by then, which inputs) -> [out, c]; the lowest go.
        keep: the mask, where it is chosen beforehand.

    Returns:
        the layer, with notes: `damping` that was needed, and `error`, the share ||X (W - W')^T||^2 / ||X W^T||^2, which
        is what the sweep and the refit minimise by the energy of the dense layer (H damped above, not below).

    Raises:
        Problem: H cannot be factored, or groups of the grid do not fit blocks of columns.
    """
    factor = statistic.factor(settings.damping)
    rows, width = weight.shape
    values = weight.float().T.clone(memory_format=torch.contiguous_format)
    values[factor.dead] = 0
    kept = torch.ones_like(values) if keep is None else keep.T.float().contiguous()
    group = pattern.of if isinstance(pattern, NofM) else settings.columns
    strip = -(-STRIP // group) * group if isinstance(pattern, NofM) else STRIP
    block = -(-settings.columns // strip) * strip if isinstance(pattern, NofM) else settings.columns
    if settings.bits:
        strip = gcd(strip, settings.group_size)  # a scale is set when all updates of its group are done
        if settings.columns % settings.group_size or settings.group_size % getattr(pattern, "of", 1):
            raise Problem(
                "params.yaml: prune.group_size",
                f"{settings.group_size} does not divide the {settings.columns} columns of a block, or the pattern it",
                "valid: a divisor of prune.columns, for N:M a multiple of M",
            )
    owed = _owed(pattern, rows, width, group)
    scales: list[Tensor] = []

    def change(column: int) -> Tensor:
        if keep is None and column % group == 0:
            inputs = slice(column, min(column + group, width))
            part = score(values[inputs].T, inputs)
            kept[inputs] = keep_highest(part, _share(pattern, part, owed, column // group)).T.float()
        new = values[column] * kept[column]
        if settings.bits is None:
            return new
        if column % settings.group_size == 0:
            inputs = slice(column, column + settings.group_size)
            largest = (values[inputs] * kept[inputs]).abs().amax(0)
            scales.append(spanning_scale(largest, settings.bits, weight.dtype))
        return Grid(settings.bits, scales[-1][:, None]).nearest(new[:, None])[:, 0].float()

    lost = sweep(values, factor.upper, change, block, strip)
    mask = kept.T.bool().contiguous()
    found, rounded = values.T, Grid(settings.bits, torch.stack(scales, 1)) if settings.bits else None
    if settings.refit and rounded is None:
        # The sweep makes up for what goes in later columns only; here earlier ones have their share, too.
        scale, unit = statistic.unit(factor.damping)
        target = weight.float() * scale
        target[:, factor.dead] = 0
        fast = weight.dtype == torch.bfloat16 == pick_dtype("auto", weight.device)
        found, fallen = refit(target, unit, mask, found * scale, settings.refit, fast)
        found, lost = found / scale, lost - fallen
    notes = {"damping": factor.damping, "error": lost / max(statistic.energy(weight), 1e-30)}
    return Pruned(found.contiguous().to(weight.dtype), mask, notes, rounded)


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
