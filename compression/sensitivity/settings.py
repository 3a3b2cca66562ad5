"""What every measure is given beside the model and the text."""

from dataclasses import dataclass

Columns = dict[str, dict[str, float]]  # by column, by layer


@dataclass(frozen=True)
class Settings:
    """Numbers that some measures take; each measure says which.

    Attributes:
        per: `block`: all layers of a block share a score; `layer`: each linear has its own.
        sparsity: s, the share of each tensor's entries that is zeroed.
        similarity: of two states: cca, svcca, pwcca or cka, see compression.sensitivity.similarity.
        components: at most so many principal components of a state are compared.
        widths: bits to which layers are rounded, each 2 to 8.
        group_size: inputs that share a scale.
    """

    per: str = "block"
    sparsity: float = 0.3
    similarity: str = "svcca"
    components: int = 20
    widths: tuple[int, ...] = (2, 3, 4, 8)
    group_size: int = 64
