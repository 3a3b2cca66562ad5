"""The multiple-choice knapsack: one option of every item, least total value, total weight within a limit.

Dynamic programming over the Pareto front of partial choices (Nemhauser and Ullmann 1969), which throws out whatever
cannot lead to less than the value sought. The bound is the linear relaxation of the items still to come (Sinha and
Zoltners 1979): on the lower convex hulls of their options, the steepest steps first. The value sought starts close to
the bound of the whole and moves away until a choice turns up, which is then the best there is.

The problem is NP-hard. Fronts stay short where weights or values come in few kinds, as the sizes of layers do; where
all differ they may not. Of a front longer than FRONT only the choices with the lowest bounds go on. What is found then
is worse than the best there is by no more than it lies above the lowest bound that was dropped: its `gap`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

GAPS = [4.0**-step for step in range(5, -1, -1)]  # shares of the gap between bound and first choice that are tried
FRONT = 50_000  # partial choices that are followed up at most
ROUNDING = 1e-13  # of the total: what sums of hundreds of numbers in another order may differ by


@dataclass(frozen=True)
class Choice:
    """An option of every item.

    Attributes:
        places: of the option chosen, item by item.
        gap: by so much, at most, the best sum of values there is undercuts this one's; 0: there is none better.
    """

    places: list[int]
    gap: float = 0.0


def least_choice(values: Sequence[Sequence[float]], weights: Sequence[Sequence[float]], limit: float) -> Choice:
    """The option of each item with the least sum of values whose sum of weights is at most `limit`.

    Among equal values the lesser weight, where the gap is 0. Whole weights keep to the limit exactly as long as their
    total is below 5e12, others to within the rounding of a sum.

    Args:
        values: of each item's options, finite, of any sign.
        weights: in the same order.

    Raises:
        ValueError: not even the lightest options keep to the limit.
    """
    items = [
        _front(np.array(value, float), np.array(weight, float)) for value, weight in zip(values, weights, strict=True)
    ]
    bounds = _bounds(items)
    whole = bounds[0]
    limit += _rounding([item.weights for item in items])
    if whole.weights[0] > limit:
        raise ValueError(f"the lightest choice weighs {whole.weights[0]}, more than {limit}")
    bound = float(whole.at(limit))
    gap = float(whole.values[np.searchsorted(whole.weights, limit, side="right") - 1]) - bound
    bound += _rounding([item.values for item in items])
    tried = (_search(items, bounds[1:], limit, bound + share * gap) for share in [*GAPS, inf])
    return next(choice for choice in tried if choice is not None)


@dataclass(frozen=True)
class Front:
    """Options of an item of which none is both lighter and better than another: lightest, hence worst, first."""

    places: NDArray[np.intp]  # among the item's options
    values: Floats
    weights: Floats


@dataclass(frozen=True)
class Relaxation:
    """Corners of the convex line that bounds the sum of values from below, by the weight that may be spent."""

    weights: Floats
    values: Floats

    def at(self, limit: Floats | float) -> Floats:
        return np.asarray(np.interp(limit, self.weights, self.values))


def _front(values: Floats, weights: Floats) -> Front:
    places = _undominated(values, weights)
    return Front(places, values[places], weights[places])


def _undominated(values: Floats, weights: Floats) -> NDArray[np.intp]:
    """Places of what no other undercuts in value at the same weight or less, by weight; the first among equals."""
    order = np.lexsort((values, weights))
    least = np.minimum.accumulate(values[order])
    kept: NDArray[np.intp] = order[np.append(True, values[order][1:] < least[:-1])]
    return kept


def _rounding(numbers: Sequence[Floats]) -> float:
    return ROUNDING * sum(float(np.abs(own).max()) for own in numbers)


def _bounds(items: Sequence[Front]) -> list[Relaxation]:
    """The relaxation of all items, of all but the first, and so on down to that of none."""
    steps = [(*step, number) for number, item in enumerate(items) for step in _steps(item)]
    steps.sort(key=lambda step: step[0] / step[1])
    values, weights, owners = np.array(steps).reshape(-1, 3).T
    bounds = []
    for first in range(len(items) + 1):
        later = owners >= first
        worst = sum(float(item.values[0]) for item in items[first:])
        lightest = sum(float(item.weights[0]) for item in items[first:])
        bounds.append(
            Relaxation(np.cumsum(np.append(lightest, weights[later])), np.cumsum(np.append(worst, values[later])))
        )
    return bounds


def _steps(item: Front) -> list[tuple[float, float]]:
    """From corner to corner of the lower convex hull: what the value falls by, negative, and what that weighs."""
    hull = [0]
    for place in range(1, len(item.values)):
        while len(hull) > 1 and _slope(item, hull[-2], hull[-1]) >= _slope(item, hull[-1], place):
            hull.pop()
        hull.append(place)
    falls, weights = np.diff(item.values[hull]), np.diff(item.weights[hull])
    return list(zip(falls.tolist(), weights.tolist(), strict=True))


def _slope(item: Front, a: int, b: int) -> float:
    return float((item.values[b] - item.values[a]) / (item.weights[b] - item.weights[a]))


def _search(items: Sequence[Front], bounds: Sequence[Relaxation], limit: float, sought: float) -> Choice | None:
    """The best choice if it is worth at most `sought`, otherwise None. `bounds[k]` is that of the items after k.

    None as well if all choices that would do have been dropped from a front that was too long; never if all will do.
    """
    values, weights, dropped = np.zeros(1), np.zeros(1), inf
    trail = []  # for every item: which of (partial choices before) x (options) were kept
    for item, later in zip(items, bounds, strict=True):
        values = (values[:, None] + item.values).ravel()
        weights = (weights[:, None] + item.weights).ravel()
        left = limit - weights
        kept = np.flatnonzero((left >= later.weights[0]) & (values + later.at(left) <= sought))
        if not len(kept):
            return None
        kept = kept[_undominated(values[kept], weights[kept])]
        if len(kept) > FRONT:
            least = values[kept] + later.at(left[kept])
            order = np.argsort(least, kind="stable")
            dropped = min(dropped, float(least[order[FRONT]]))
            kept = kept[np.sort(order[:FRONT])]
        values, weights = values[kept], weights[kept]
        trail.append(kept)
    choice, place = [], len(values) - 1  # the heaviest is the best
    gap = max(float(values[place]) - dropped, 0.0)
    for item, kept in zip(reversed(items), reversed(trail), strict=True):
        place, option = divmod(int(kept[place]), len(item.places))
        choice.append(int(item.places[option]))
    return Choice(choice[::-1], gap)
