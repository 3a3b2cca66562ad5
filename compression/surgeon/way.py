"""What goes: elements, lines, coupled structures or dimensions of the stream.

Each is a way to prune, and all answer the same four questions.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from compression.core.checkpoint import Checkpoint
from compression.pruning.pattern import Pattern, Structured
from compression.surgeon.factors import Factors, Inverses
from compression.surgeon.settings import Settings

Look = tuple[str, dict[str, Tensor]]  # a layer, and what it scores, by name
Scores = Mapping[str, Tensor]
Left = tuple[Tensor, Tensor, float]  # W', its mask, and what was predicted that it costs, each for itself
Looks = Callable[[], Iterable[Look]]  # of every layer whose curvature was measured; called again, the same again


@dataclass(frozen=True)
class Quota:
    """How many of a layer's weights are to go.

    Attributes:
        size: weights that it has.
        dropped: that go if every layer is seen by itself.
        least, most: where one threshold for all layers may move that to.
    """

    size: int
    dropped: int
    least: int
    most: int


@dataclass(frozen=True)
class Task:
    """What stage prune asks for.

    Attributes:
        source: the model as it came.
        pattern: what goes.
        quotas: of each linear in the blocks.
        together: one threshold for all layers, within their quotas; else each meets its own.
    """

    source: Checkpoint
    pattern: Pattern | Structured
    quotas: Mapping[str, Quota]
    together: bool
    settings: Settings

    @property
    def updating(self) -> bool:
        """Whether what stays moves, so that costs are those of the optimal brain surgeon and inverses are needed."""
        return self.settings.update != "none"

    def due(self, share: float) -> int:
        """Weights that are to have gone when so much of the quotas is due."""
        return round(share * sum(quota.dropped for quota in self.quotas.values()))


class Way(Protocol):
    """W' is float32 [R, c], with the bias, if there is one, as its last column; masks are bool [R, C], without it."""

    def layers(self) -> list[str]:
        """Layers whose curvature is needed."""

    def look(self, layer: str, weight: Tensor, keep: Tensor, factors: Factors, inverses: Inverses) -> dict[str, Tensor]:
        """What the layer scores, by name, where `keep` is what earlier shots have left."""

    def decide(self, looks: Looks, share: float) -> Mapping[str, Any]:
        """By layer, what has gone after a shot, once `share` of the quotas is due."""

    def remove(self, weight: Tensor, keep: Tensor, decision: Any, seen: Scores, inverses: Inverses) -> Left:
        """What is left of a layer without what was decided on."""
