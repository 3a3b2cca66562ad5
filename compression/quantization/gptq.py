"""GPTQ: weights are rounded column by column, and what each column loses is made up for in those behind it.

Frantar et al. 2022, arXiv 2210.17323, section 3: the OBS sweep of compression/sweep.py with q_j the nearest points of
the grid. Under a mask, a dropped weight's only point is zero: what earlier columns have put there is an error like any
other and goes on to the columns behind, so that the kept weights make up for it.
"""

from math import gcd, lcm
from typing import NamedTuple

import torch
from torch import Tensor

from compression.quantization.grid import Grid, ends, fit_grid
from compression.quantization.method import Quantized, Settings
from compression.statistics import Gram
from compression.sweep import STRIP, sweep

STATISTIC = Gram
COLUMNS = 128  # a block of the sweep


def quantize(
    weight: Tensor,
    bits: int,
    settings: Settings,
    statistic: Gram,
    keep: Tensor | None = None,
    given: Grid | None = None,
) -> Quantized:
    """Rounds W so that X W^T changes little.

    In the natural order a group's grid is fitted to its weights as they are when its turn comes. In the order of
    activations, columns of a group are not neighbours in the sweep: grids are fitted to W beforehand, and the file
    needs no index of groups.

    Args:
        weight: W [out, in]; the group size divides in.
        bits: b.
        settings: all of them; with clip, errors are weighted by the inputs' squared norms.
        statistic: X^T X over the calibration tokens.
        keep: mask bool [out, in]; None: all.
        given: not used.

    Returns:
        codes and grid, zero for inputs that were zero on every token, with notes: `damping` that was needed, and
        `error`, the share ||X (W - W')^T||^2 / ||X W^T||^2 (H damped above, not below).

    Raises:
        Problem: H cannot be factored, however much it is damped.
    """
    factor = statistic.factor(settings.damping, settings.order == "activation")
    importance = statistic.matrix().diagonal() if settings.clip else None
    kept = torch.ones_like(weight, dtype=torch.float32) if keep is None else keep.float()
    dense = weight.float() * kept
    dense[:, factor.order[factor.dead]] = 0  # whatever they are, they become zero, and must not widen a grid
    fixed = settings.order == "activation" or not isinstance(settings.group_size, int)
    size = settings.group_size if isinstance(settings.group_size, int) else weight.shape[1]
    values, mask = dense.T[factor.order].contiguous(), kept.T[factor.order].contiguous()
    inputs, codes = factor.order.tolist(), torch.empty(values.shape, dtype=torch.int8, device=values.device)
    grids: dict[int, Grid] = {}
    columns_of: dict[int, _Column] = {}
    if fixed:
        whole = fit_grid(dense, bits, settings.group_size, settings.symmetric, importance, weight.dtype)
        columns_of = {group: _column(whole, group, len(weight)) for group in range(whole.scale.shape[1])}

    def change(place: int) -> Tensor:
        group, start = divmod(inputs[place], size)
        if start == 0 and not fixed:
            part = slice(place, place + size)
            weights = (values[part] * mask[part]).T
            own = None if importance is None else importance[part]
            grids[group] = fit_grid(weights, bits, size, settings.symmetric, own, weight.dtype)
            columns_of[group] = _column(grids[group], 0, len(weight))
        new, found = columns_of[group].nearest(values[place] * mask[place])
        codes[place] = found
        return new

    # A grid is fitted when all updates of its group are done, so groups have to begin where strips and blocks do.
    columns, strip = (COLUMNS, STRIP) if fixed else (lcm(COLUMNS, size), gcd(STRIP, size))
    lost = sweep(values, factor.upper, change, columns, strip)
    ordered = torch.empty_like(codes)
    ordered[factor.order] = codes
    notes = {"damping": factor.damping, "error": lost / max(statistic.energy(weight), 1e-30)}
    return Quantized(ordered.T.contiguous(), whole if fixed else _joined(grids), notes)


class _Column(NamedTuple):
    """One group's grid for columns [out] of W, in as few operations as there can be: they are done for every input.

    Attributes:
        scale: [out] as it is stored, and in float32.
        zero: float32 [out], or None.
    """

    low: int
    high: int
    scale: Tensor
    exact: Tensor
    zero: Tensor | None

    def nearest(self, column: Tensor) -> tuple[Tensor, Tensor]:
        """The values nearest to weights float32 [out], float32, and their codes, in float32; column is worked on."""
        codes = column.div_(self.exact)
        if self.zero is None:
            codes.round_().clamp_(self.low, self.high)
            return (codes.to(self.scale.dtype) * self.scale).float(), codes
        codes.add_(self.zero).round_().clamp_(self.low, self.high)
        return ((codes - self.zero).to(self.scale.dtype) * self.scale).float(), codes


def _column(grid: Grid, group: int, rows: int) -> _Column:
    scale = grid.scale[:, group].expand(rows).contiguous()
    zero = None if grid.zero is None else grid.zero[:, group].float().expand(rows).contiguous()
    return _Column(*ends(grid.bits), scale, scale.float(), zero)


def _joined(grids: dict[int, Grid]) -> Grid:
    """The grid of all groups, from those of each."""
    parts = [grids[group] for group in sorted(grids)]
    zeros = [part.zero for part in parts if part.zero is not None]
    return Grid(parts[0].bits, torch.cat([part.scale for part in parts], 1), torch.cat(zeros, 1) if zeros else None)
