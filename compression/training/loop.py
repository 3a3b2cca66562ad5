"""The training loop that retraining and unlearning share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from compression.core.errors import Problem
from compression.core.journal import Journal
from compression.training.workers import summed, summed_figures, workers

SAVE_EVERY = 10  # steps

Figures = dict[str, float]
Curves = dict[str, list[float]]


@dataclass(frozen=True)
class Recipe:
    """AdamW without decay; linear warm-up over `warmup` of the steps, then linear decay to zero.

    The gradient of a step is the mean over `accumulation` batches, clipped to a norm of `clip`.
    """

    steps: int
    learning_rate: float
    warmup: float
    clip: float
    accumulation: int = 1

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        warm = round(self.warmup * self.steps)
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        return self.learning_rate * (self.steps - step) / max(1, self.steps - warm)


class Watcher(Protocol):
    """Looks at a model in training now and then; the values of the best look are those that training ends with."""

    @property
    def every(self) -> int:
        """Steps from look to look; the last step is always looked at."""

    def look(self, curves: Curves) -> tuple[bool, str | None]:
        """Adds its figures to the curves, which hold those of all looks so far, also of a run that was killed.

        Returns:
            whether the values are the best so far, and a reason to stop, or None.
        """


class Watch(NamedTuple):
    """Watches one figure, the loss on text that is not trained on say; the lowest is the best.

    Attributes:
        loss: of those sequences, in nats a token; the same in every process.
        every: steps from look to look; the last step is always looked at.
        patience: looks without a new best after which training stops; 0: it never does.
    """

    loss: Callable[[], float]
    every: int
    patience: int

    def look(self, curves: Curves) -> tuple[bool, str | None]:
        """As in `Watcher`; the figures are `held_out`."""
        looks = curves.setdefault("held_out", [])
        looks.append(self.loss())
        best = min(looks)
        tired = self.patience and len(looks) - 1 - looks.index(best) >= self.patience
        return looks[-1] == best, f"no better on held-out text for {self.patience} looks" if tired else None


def train(
    parameters: dict[str, nn.Parameter],
    loss: Callable[[int], tuple[Tensor, dict[str, float]]],
    recipe: Recipe,
    journal: Journal,
    what: str,
    tokens: int,
    stop: Callable[[dict[str, float]], str | None] = lambda _: None,
    watch: Watcher | None = None,
) -> tuple[Curves, str]:
    """Trains `parameters` in place; a killed run goes on at its last saved step and ends with the same bytes.

    Where several processes train, the batches of a step are dealt out among them; the step is the same.

    Args:
        parameters: by name. Those in less than float32 are trained through a float32 copy: a step of 1e-4 is
            lost in bfloat16.
        loss: of a batch, by its number, with figures worth keeping; draws its data from that number alone.
        tokens: a batch, for the bar.
        stop: is given the figures after each step; returns a reason to stop, or None.
        watch: which values are best, and another reason to stop; without it the last step's values are kept, as they
            are if no look was a best one.

    Returns:
        the figures of all steps, by name, those of the looks among them, and why training ended.

    Raises:
        Problem: the loss or its gradient is not finite.
    """
    masters = {name: nn.Parameter(own.detach().float().clone()) for name, own in parameters.items()}
    best: dict[str, Tensor] = {}
    optimizer = torch.optim.AdamW(masters.values(), lr=0.0, weight_decay=0.0, fused=True)
    first, state = journal.load()
    curves: Curves = {name[6:]: state[name].tolist() for name in state if name.startswith("curve.")}
    if first:
        _restore(optimizer, masters, state, first)
        _copy_back(masters, parameters)
        best = {name[5:]: state[name].to(masters[name[5:]].device) for name in state if name.startswith("best.")}
    stopped, team = "all steps taken", workers()
    bar = tqdm(
        range(first, recipe.steps),
        desc=what,
        unit="step",
        total=recipe.steps,
        initial=first,
        disable=None if team.first else True,
        leave=False,
    )
    for step in bar:
        figures = _backward(loss, step, recipe.accumulation, what)
        for name, master in masters.items():
            own = parameters[name]
            master.grad = summed(torch.zeros_like(master) if own.grad is None else own.grad.float())
            own.grad = None
        norm = nn.utils.clip_grad_norm_(masters.values(), recipe.clip)
        if not norm.isfinite():
            raise Problem(what, f"the gradient is {norm.item()} at step {step}", "lower the learning rate")
        optimizer.param_groups[0]["lr"] = recipe.rate(step)
        optimizer.step()
        _copy_back(masters, parameters)
        for name, figure in figures.items():
            curves.setdefault(name, []).append(figure)
        shown = ", ".join(f"{name} {figure:.3f}" for name, figure in figures.items())
        bar.set_postfix_str(f"{shown}, {tokens * recipe.accumulation * (bar.format_dict['rate'] or 0):.0f} tokens/s")
        if reason := stop(figures):
            stopped = f"{reason} at step {step + 1}"
        last = stopped != "all steps taken" or step + 1 == recipe.steps
        if watch and (last or (step + 1) % watch.every == 0):
            best_so_far, reason = watch.look(curves)
            if best_so_far:
                best = {name: master.detach().clone() for name, master in masters.items()}
            if reason:
                stopped = f"{reason} at step {step + 1}"
        if stopped != "all steps taken":
            break
        if (step + 1) % SAVE_EVERY == 0 and team.first:
            saved = {f"curve.{name}": torch.tensor(curve, dtype=torch.float64) for name, curve in curves.items()}
            saved |= {f"best.{name}": value for name, value in best.items()}
            journal.save(step + 1, _state(optimizer, masters) | saved)
    if best:
        for name, master in masters.items():
            master.data.copy_(best[name])
        _copy_back(masters, parameters)
    return curves, stopped


def _backward(loss: Callable[[int], tuple[Tensor, dict[str, float]]], step: int, batches: int, what: str) -> Figures:
    """This process's share of a step's gradients, a mean over its batches; returns the mean of their figures."""
    team, total = workers(), Figures()
    for batch in range(step * batches + team.rank, (step + 1) * batches, team.size):
        value, figures = loss(batch)
        if not value.isfinite():
            raise Problem(what, f"the loss is {value.item()} at step {step}", "lower the learning rate")
        (value / batches).backward()
        for name, figure in figures.items():
            total[name] = total.get(name, 0.0) + figure / batches
    return summed_figures(total)


@torch.no_grad()
def _copy_back(masters: dict[str, nn.Parameter], parameters: dict[str, nn.Parameter]) -> None:
    for name, own in parameters.items():
        own.copy_(masters[name])


def _state(optimizer: torch.optim.Optimizer, masters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    saved: dict[str, Tensor] = {}
    for name, master in masters.items():
        own = optimizer.state[master]
        saved |= {
            f"value.{name}": master.data,
            f"mean.{name}": own["exp_avg"],
            f"square.{name}": own["exp_avg_sq"],
        }
    return saved


def _restore(
    optimizer: torch.optim.Optimizer, masters: dict[str, nn.Parameter], state: dict[str, Tensor], step: int
) -> None:
    for name, master in masters.items():
        master.data.copy_(state[f"value.{name}"])
        optimizer.state[master] = {
            "step": torch.tensor(float(step)),
            "exp_avg": state[f"mean.{name}"].to(master.device),
            "exp_avg_sq": state[f"square.{name}"].to(master.device),
        }
