"""The OBS sweep: columns are changed from left to right, and what each loses is made up for in those behind it.

Symbols as in SparseGPT (arXiv 2301.00774, section 3) and GPTQ (arXiv 2210.17323, section 3): H = X^T X / tokens +
lambda I, U upper triangular with H^-1 = U^T U. What a column j loses, e_j = (w_j - q_j) / U_jj, is taken off every
later column k as e_j U_jk. Within a block this goes by a few columns at a time, behind the block by one product:
nearly all operations are matrix products, though every column sees all updates of those before it.
"""

from collections.abc import Callable

import torch
from torch import Tensor

STRIP = 16  # columns that are updated one by one before a product updates the rest of their block


def sweep(values: Tensor, upper: Tensor, change: Callable[[int], Tensor], columns: int, strip: int = STRIP) -> float:
    """Changes W column by column, in place.

    Args:
        values: W^T float32 [in, out]: a column of W lies in one piece.
        upper: U [in, in].
        change: gives q_j [out] for a column j. When it is called, all columns of j's strip have seen every column
            before j, and where j is the first of its strip, all columns of its block have.
        columns: of a block.
        strip: columns that are updated one by one; a block's last strip may be shorter.

    Returns:
        the sum of all e_j^2.
    """
    width, pivots, lost = len(values), upper.diagonal().tolist(), 0.0
    for start in range(0, width, columns):
        end = min(start + columns, width)
        errors = torch.empty(end - start, values.shape[1], device=values.device)
        for first in range(start, end, strip):
            last = min(first + strip, end)
            for column in range(first, last):
                new, error = change(column), errors[column - start]
                torch.sub(values[column], new, out=error).mul_(1 / pivots[column])
                values[column] = new
                values[column + 1 : last].addr_(upper[column, column + 1 : last], error, alpha=-1)
            values[last:end].addmm_(upper[first:last, last:end].T, errors[first - start : last - start], alpha=-1)
        values[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
        lost += errors.square().sum().item()
    return lost
