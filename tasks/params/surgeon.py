"""Section `surgeon`: how method surgeon prunes."""

from typing import ClassVar, Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from tasks.params.base import Section


class Surgeon(Section):
    section: ClassVar[str] = "surgeon"

    curvature: Literal["kfac", "activations", "identity"]
    labels: Literal["data", "sampled"]
    samples: PositiveInt
    weighted: bool
    passes: NonNegativeInt
    damping_inputs: PositiveFloat
    damping_outputs: PositiveFloat
    shots: PositiveInt
    update: Literal["correlated", "independent", "none"]
    correlate: NonNegativeInt
    multiple: PositiveInt
    correction_steps: NonNegativeInt
    correction_rank: PositiveInt
    correction_learning_rate: PositiveFloat
    seed: NonNegativeInt
