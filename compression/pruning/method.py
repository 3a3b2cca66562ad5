"""What every pruning method is given beside the weights, and what it gives back."""

from dataclasses import dataclass, field

from torch import Tensor

from compression.quantization.grid import Grid


@dataclass(frozen=True)
class Settings:
    """Numbers that some methods take; each method says which.

    Attributes:
        damping: share of the mean of diag H that is added to it.
        columns: B, the inputs that are pruned together before the rest is updated.
        choose: `layer`: the whole mask first; `columns`: anew in each block of columns, after its updates.
        iterations: at most so many ADMM steps.
        refit: steps of conjugate gradients that refit the kept weights in the end; not with a grid.
        bits, group_size: of the grid to which kept weights are rounded in the same pass; bits None: no grid.
        before: mask bool [out, in] of an earlier cycle; what it dropped goes first.
    """

    damping: float = 0.01
    columns: int = 128
    choose: str = "layer"
    iterations: int = 300
    refit: int = 0
    bits: int | None = None
    group_size: int = 64
    before: Tensor | None = None


@dataclass(frozen=True)
class Pruned:
    """A layer after pruning.

    Attributes:
        weight: [out, in] in the type it came in; zero where the mask drops.
        keep: bool [out, in], True where the weight stays.
        notes: figures for the ledger, by name.
        grid: the grid on which the weight lies, if it was rounded.
    """

    weight: Tensor
    keep: Tensor
    notes: dict[str, float] = field(default_factory=dict)
    grid: Grid | None = None
