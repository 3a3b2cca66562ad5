"""When to stop, and which step to keep: looks at a part of the text to be forgotten and at text that is held out.

A look holds where the retained text is spared: its loss has not risen, and the model has not moved from the one that it
started as, beyond the ceilings. Kept is the look that holds with the highest loss on the text to be forgotten; all
above `forget` count alike, since what is past a model that never saw the text is damage. Training stops at the first
look that does not hold, and at the first that is up there. Where control text is looked at, which is like the text to
be forgotten but was never learned, `forget` is what this very model loses on it, look by look. Where an objective puts
something else in the place of the text and does not push it away, its loss says nothing of how far that has come: kept
is the last look that holds.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from compression.core.errors import Problem
from compression.training.loop import Curves, Figures
from compression.training.samples import Samples
from compression.unlearning.draw import Learner
from compression.unlearning.likelihood import divergences, token_losses

COLLAPSED = math.log(2)  # a rise of the retained loss in nats, at which its perplexity has doubled
LOOK = "look."  # before the names of a look's figures among the curves


class Ceilings(NamedTuple):
    """In nats a token; None: there is none.

    Attributes:
        forget: loss on the text to be forgotten at which it counts as forgotten; that on the control text in its
            place if there is one.
        retain: rise of the loss on held-out retained text.
        kl: KL(p0 || p) there.
    """

    forget: float | None
    retain: float | None
    kl: float | None


class Looks:
    """A `compression.training.loop.Watcher`.

    Args:
        measure: gives the figures of `measured`.
        start: the same, before training.
        every: steps from look to look.
        rises: whether the objective pushes the loss on the text to be forgotten up.
    """

    def __init__(
        self, measure: Callable[[], Figures], start: Figures, ceilings: Ceilings, every: int, rises: bool = True
    ) -> None:
        self.measure, self.start, self.ceilings, self.every, self.rises = measure, start, ceilings, every, rises

    def look(self, curves: Curves) -> tuple[bool, str | None]:
        """See `Watcher`."""
        figures = self.measure()
        for name, figure in figures.items():
            curves.setdefault(f"{LOOK}{name}", []).append(figure)
        return self.kept(curves) == len(curves[f"{LOOK}forget"]) - 1, self._reason(figures)

    def kept(self, curves: Curves) -> int | None:
        """Number of the look whose values are kept, counted from 0; None if none holds. The first of equals."""
        looks = looked(curves)
        holding = [number for number, figures in enumerate(looks) if self._broken(figures) is None]
        if not self.rises:
            return max(holding, default=None)
        return max(holding, key=lambda number: self._forgotten(looks[number]), default=None)

    def refuse_collapsed(self, curves: Curves) -> int:
        """Number of the look whose values are kept.

        Raises:
            Problem: no look holds, or the retained text has gone as well.
        """
        hint = "lower unlearn.learning_rate or forget_weight, raise retain_weight, or look more often (check_every)"
        number = self.kept(curves)
        if number is None:
            broken = self._broken(looked(curves)[0])
            raise Problem("params.yaml: unlearn", f"the model did not hold up to the first look: {broken}", hint)
        rise = looked(curves)[number]["retain"] - self.start["retain"]
        if rise > COLLAPSED:
            raise Problem(
                "params.yaml: unlearn",
                f"the model collapsed: perplexity on held-out retained text is {math.exp(rise):.3g} times what it was",
                f"{hint}; or set retain_ceiling, to keep a step before that",
            )
        return number

    def _ceiling(self, figures: Figures) -> float | None:
        """Loss at which the text counts as forgotten; None: it never does."""
        return figures.get("control", self.ceilings.forget)

    def _forgotten(self, figures: Figures) -> float:
        """The larger, the more is forgotten; the same for all that is above the ceiling."""
        ceiling = self._ceiling(figures)
        return figures["forget"] if ceiling is None else min(figures["forget"] - ceiling, 0)

    def _broken(self, figures: Figures) -> str | None:
        """Which ceiling a look is above, if any. What is not a number holds nowhere."""
        rise = figures["retain"] - self.start["retain"]
        for name, figure, ceiling in (
            ("retained loss rose by", rise, self.ceilings.retain),
            ("KL to the start rose to", figures["kl"], self.ceilings.kl),
        ):
            if not figure <= (math.inf if ceiling is None else ceiling):
                return f"{name} {figure:.3g}, above {ceiling}"
        return None

    def _reason(self, figures: Figures) -> str | None:
        if broken := self._broken(figures):
            return broken
        ceiling = self._ceiling(figures)
        if ceiling is None or figures["forget"] < ceiling:
            return None
        return f"forget loss reached {ceiling:.3g}{', that of the control text' if 'control' in figures else ''}"


def looked(curves: Curves) -> list[Figures]:
    """The figures of every look."""
    own = {name.removeprefix(LOOK): curve for name, curve in curves.items() if name.startswith(LOOK)}
    return [dict(zip(own, figures, strict=True)) for figures in zip(*own.values(), strict=True)]


def judged(forget: Samples, rows: int) -> Samples:
    """The part of the text to be forgotten that looks see: its first rows, at most all of them."""
    return forget.take(torch.arange(min(rows, len(forget.ids))))


def compared(control: Samples, rows: int) -> Samples:
    """The part of the control text that looks see: its last rows, at most all. Evaluation takes the first."""
    return control.take(torch.arange(-min(rows, len(control.ids)), 0))


@torch.no_grad()
def measured(learner: Learner, forget: Samples, retain: Samples, control: Samples | None, rows: int) -> Figures:
    """forget, retain and, if there is such text, control: mean losses a token; and kl, mean KL(p0 || p) a token of the
    retained answers; in nats.

    Args:
        rows: that go through the model together.
    """
    texts = {"forget": forget} if control is None else {"forget": forget, "control": control}
    losses: dict[str, list[Tensor]] = {name: [] for name in (*texts, "retain", "kl")}
    for name, samples in texts.items():
        for part in _parts(samples, rows):
            (logits,) = learner.logits(part)
            losses[name].append(token_losses(logits, part))
    for part in _parts(retain, rows):
        (logits,), (start,) = learner.logits(part), learner.start_logits(part)
        losses["retain"].append(token_losses(logits, part))
        losses["kl"].append(divergences(start, logits, part))
    return {name: torch.cat(each).double().mean().item() for name, each in losses.items()}


def _parts(samples: Samples, rows: int) -> list[Samples]:
    return [samples.take(chosen).trimmed() for chosen in torch.arange(len(samples.ids)).split(rows)]
