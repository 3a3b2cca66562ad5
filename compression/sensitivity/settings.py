"""What every measure is given beside the model and the text."""

from dataclasses import dataclass

from compression.sensitivity.rounding import Tried

Columns = dict[str, dict[str, float]]  # by column, by layer


@dataclass(frozen=True)
class Settings:
    """Numbers that some measures take; each measure says which.

    Attributes:
        per: `block`: all layers of a block share a score; `group`: those that runtimes fuse do (q, k and v; gate and
            up); `layer`: each linear has its own.
        sparsity: s, the share of each tensor's entries that is zeroed.
        similarity: of two states: cca, svcca, pwcca or cka, see compression.sensitivity.similarity.
        components: at most so many principal components of a state are compared.
        widths: bits to which layers are rounded, each 2 to 8.
        group_size: inputs that share a scale.
        tried: the layers' weights at each width; None: they are rounded to nearest on the spot.
        curvature: how the loss bends, in TDMPQ: `diagonal` or `outputs`.
        noise: standard deviation of what is added to weights.
    """

    per: str = "block"
    sparsity: float = 0.3
    similarity: str = "svcca"
    components: int = 20
    widths: tuple[int, ...] = (2, 3, 4, 8)
    group_size: int = 64
    tried: Tried | None = None
    curvature: str = "diagonal"
    noise: float = 1.0
