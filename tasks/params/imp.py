"""Section `imp`: the cycles of iterative magnitude pruning, and how each retrains."""

from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from tasks.params.base import Section
from tasks.params.retrain import Retrain

MODEL = "data/taught"  # what is compressed: the model of stage download, unless section `teach` teaches it


def folder(name: str) -> str:
    """Where a cycle's checkpoint is."""
    return f"data/imp/{name}"


class Cycle(BaseModel):
    """Where a cycle starts, and how sparse it ends."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    source: str
    sparsity: Annotated[float, Field(gt=0, lt=1)]


class Imp(Section):
    section: ClassVar[str] = "imp"

    cycles: dict[Annotated[str, Field(pattern=r"^[a-z0-9_]+$")], Cycle]
    retrain: Retrain

    def only(self, name: str) -> "Imp":
        """What one cycle reads."""
        return self.model_copy(update={"cycles": {name: self.cycles[name]}})

    def checkpoints(self) -> dict[str, float]:
        """Sparsity of each checkpoint that pruning may start from, by folder."""
        return {MODEL: 0.0} | {folder(name): cycle.sparsity for name, cycle in self.cycles.items()}
