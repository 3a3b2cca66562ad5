"""What stage prune says to the surgeon beside how much is to go."""

from dataclasses import dataclass
from typing import Literal

from compression.surgeon.correction import Correction
from compression.surgeon.curvature import Curvature


@dataclass(frozen=True)
class Settings:
    """Numbers of LLM Surgeon.

    Attributes:
        curvature: how A and G are measured.
        damping_inputs, damping_outputs: shares of the mean diagonal of A and of G that are added to it.
        shots: T; shot t aims at t / T of what is to go, with the curvature of the model as it is by then.
        update: of what stays. `correlated`: for all that goes together; `independent`: the sum of the updates for each
            alone; `none`: what goes is zeroed (OBD).
        correlate: elements that are solved for together, at most; 0: all of a layer.
        multiple: widths that coupled structures leave are multiples of it.
        correction: what is learned between shots; None: nothing.
    """

    curvature: Curvature
    damping_inputs: float
    damping_outputs: float
    shots: int
    update: Literal["correlated", "independent", "none"]
    correlate: int
    multiple: int
    correction: Correction | None = None
