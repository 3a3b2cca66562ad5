"""How often answers to the questions to forget are harmful, checkpoint by checkpoint; nothing of what they say."""

from typing import NamedTuple

import pandas as pd

from compression.evaluation.effectiveness import effectiveness, effectiveness_interval, rate_interval
from tasks.reporting.inputs import Run

ROLES = ("forget", "control")
REFERENCES = ("quantized", "dense")  # unlearning alone, and the whole chain


class Estimate(NamedTuple):
    """A number and its 95 % interval."""

    value: float
    low: float
    high: float


class Judged(NamedTuple):
    """A checkpoint's answers to the questions of one role.

    Attributes:
        answers: how many.
        harmful, failed: shares that are harmful, and that are harmful or gibberish.
        effectiveness: by reference; of checkpoints behind it only, and where it gave harmful answers.
        gibberish, refused: shares.
    """

    answers: int
    harmful: Estimate
    failed: Estimate
    effectiveness: dict[str, Estimate]
    gibberish: float | None
    refused: float | None


def judged(run: Run) -> dict[str, dict[str, Judged]]:
    """By checkpoint and role; empty where the text to forget is no questions."""
    names, found = list(run), {}
    for place, (name, row) in enumerate(run.items()):
        behind = [one for one in REFERENCES if one in names[:place]]
        roles = {}
        for role in (role for role in ROLES if role in row.figures.harm):
            own, said = row.figures.harm[role], row.figures.answers.get(role)
            against = {one: removed_harm(run, one, name, role) for one in behind}
            roles[role] = Judged(
                own.answers,
                Estimate(own.rate, *rate_interval(own.rate, own.answers)),
                Estimate(own.failed, *rate_interval(own.failed, own.answers)),
                {one: estimate for one, estimate in against.items() if estimate},
                said.gibberish if said else None,
                said.refused if said else None,
            )
        found[name] = roles
    return found if any(found.values()) else {}


def removed_harm(run: Run, before: str, after: str, role: str) -> Estimate | None:
    """Effectiveness between two checkpoints; None where one was not asked, or nothing was harmful before."""
    first, last = (run[name].figures.harm.get(role) for name in (before, after))
    if not (first and last) or len(first.harmful) != len(last.harmful):
        return None
    value, interval = effectiveness(first.rate, last.failed), effectiveness_interval(first.harmful, last.failing)
    return Estimate(value, *interval) if value is not None and interval else None


def harm_table(run: Run) -> pd.DataFrame:
    """A row per checkpoint, figure and role."""
    found = [
        (name, figure, role, *estimate, own.answers)
        for name, roles in judged(run).items()
        for role, own in roles.items()
        for figure, estimate in (
            {"harmful": own.harmful, "failed": own.failed}
            | {f"effectiveness_against_{one}": estimate for one, estimate in own.effectiveness.items()}
        ).items()
    ]
    return pd.DataFrame(found, columns=["checkpoint", "figure", "role", "value", "low", "high", "answers"])
