"""What every quantiser is given beside a layer's weight, and what it gives back."""

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from compression.quantization.grid import Grid, GroupSize


@dataclass(frozen=True)
class Settings:
    """Numbers that some quantisers take; each says which.

    Attributes:
        group_size: inputs that share a scale.
        symmetric: whether the grid's zero point is the code 0.
        clip: whether the span of each group is searched for, so that the weights err least.
        order: of the columns that GPTQ rounds one after the other; `activation`: falling norms of the inputs.
        damping: share of the mean of diag H that is added to it.
    """

    group_size: GroupSize = 64
    symmetric: bool = True
    clip: bool = False
    order: Literal["natural", "activation"] = "natural"
    damping: float = 0.01


@dataclass(frozen=True)
class Quantized:
    """A layer on its grid.

    Attributes:
        codes: int8 [out, in]; where the mask drops, those that stand for zero.
        notes: figures for the ledger, by name.
    """

    codes: Tensor
    grid: Grid
    notes: dict[str, float] = field(default_factory=dict)
