"""The search: propose widths, obtain what they cost, correct the prediction, end by the rule.

It sees numbers only: widths, their predicted error and cost, and limits. What a candidate really
costs comes from the caller, who prunes, builds and measures it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from edgeprune.pruning.allocate import Widths, best_within

MAX_CANDIDATES = 5
RUNG_STEP = 0.15  # of what pruning can still take from the chosen candidate, from one rung to the next
CLOSE = 0.03  # a candidate that uses all but this share of a limit ends the search

Status = Literal["met", "missed", "noisy"]
Ending = Literal["close", "neighbour", "out_of_reach", "candidates"]


@dataclass(frozen=True)
class Costs:
    """What a candidate costs, by constraint, in the constraint's unit, and whether the limits hold."""

    values: dict[str, float]
    status: Status


@dataclass(frozen=True)
class Trial:
    widths: Widths
    predicted: dict[str, float]
    obtained: Costs


@dataclass(frozen=True)
class Outcome:
    """The trials in order, the index of the chosen one, and why the search ended."""

    trials: tuple[Trial, ...]
    chosen: int
    ending: Ending
    reason: str


class CostModel:
    """Corrects an estimator by what was obtained: a line through the obtained points nearest by.

    With one point the estimate is scaled; beyond the outermost points the last piece is prolonged.
    """

    def __init__(self, estimated: float, obtained: float) -> None:
        self._points = {estimated: obtained}

    def correct(self, estimated: float, obtained: float) -> None:
        self._points[estimated] = obtained

    def predict(self, estimated: float) -> float:
        xs = sorted(self._points)
        if len(xs) > 1:
            right = int(np.clip(np.searchsorted(xs, estimated), 1, len(xs) - 1))
            low, high = xs[right - 1], xs[right]
            slope = (self._points[high] - self._points[low]) / (high - low)
            if slope > 0:
                return self._points[low] + slope * (estimated - low)
        nearest = min(xs, key=lambda x: abs(x - estimated))
        return self._points[nearest] * estimated / nearest


def search(
    options: Sequence[Widths],
    error: Callable[[Widths], float],
    estimate: Callable[[Widths], Mapping[str, float]],
    dense: tuple[Widths, Mapping[str, float]],
    limits: Mapping[str, float],
    margins: Mapping[str, float],
    obtain: Callable[[int, Widths, dict[str, float]], Costs],
) -> Outcome:
    """The option of the least error within all limits, in at most MAX_CANDIDATES candidates.

    estimate: the uncorrected cost of an option, by constraint; dense: the dense widths and what
    they really cost. margins: share of each limit to stay below, for the noise of a measurement.
    obtain(index, widths, predicted) prunes, builds and measures.
    """
    estimates = {widths: estimate(widths) for widths in {*options, dense[0]}}
    models = {name: CostModel(estimates[dense[0]][name], dense[1][name]) for name in limits}
    trials: dict[Widths, Trial] = {}

    def predict(widths: Widths) -> dict[str, float]:
        if widths in trials:
            return trials[widths].obtained.values
        return {name: models[name].predict(estimates[widths][name]) for name in limits}

    def fits(widths: Widths) -> bool:
        if widths in trials:
            return trials[widths].obtained.status == "met"
        return all(value <= limits[name] * (1 - margins[name]) for name, value in predict(widths).items())

    def usage(values: Mapping[str, float]) -> float:
        return max(values[name] / limits[name] for name in limits)

    ending, reason = "candidates", f"{MAX_CANDIDATES} candidates were tried"
    while len(trials) < MAX_CANDIDATES:
        proposed = best_within(options, error, fits)
        if proposed is None:
            proposed = min(options, key=lambda widths: usage(predict(widths)))
            if proposed in trials:
                ending, reason = "out_of_reach", "the smallest candidate exceeds the budget"
                break
        if proposed in trials:
            ending, reason = "neighbour", "every better candidate on the width grid exceeds the budget"
            break
        predicted = predict(proposed)
        trials[proposed] = trial = Trial(proposed, predicted, obtain(len(trials), proposed, predicted))
        for name, value in trial.obtained.values.items():
            models[name].correct(estimates[proposed][name], value)
        used = usage(trial.obtained.values)
        if trial.obtained.status == "met" and used >= 1 - CLOSE:
            ending, reason = "close", f"the candidate uses {100 * used:.1f} % of the budget"
            break
    order = list(trials.values())
    met = [trial for trial in order if trial.obtained.status == "met"]
    if met:
        best = min(met, key=lambda trial: error(trial.widths))
    else:
        best = min(order, key=lambda trial: usage(trial.obtained.values))
    return Outcome(tuple(order), order.index(best), ending, reason)


def smaller_rungs(
    options: Sequence[Widths],
    error: Callable[[Widths], float],
    estimate: Callable[[Widths], Mapping[str, float]],
    chosen: tuple[Widths, Mapping[str, float]],
    limits: Iterable[str],
    count: int,
) -> list[Widths]:
    """Up to `count` options below the chosen one, each with RUNG_STEP less of what is prunable than the one before.

    chosen: its widths and what it really costs; estimates are corrected by that. Fewer where the width
    grid ends or holds nothing new.
    """
    limits = list(limits)
    widths, obtained = chosen
    scale = {name: obtained[name] / estimate(widths)[name] for name in limits}
    costs = {option: {name: scale[name] * estimate(option)[name] for name in limits} for option in options}
    floor = {name: min(cost[name] for cost in costs.values()) for name in limits}
    found: list[Widths] = []
    for step in range(1, count + 1):
        left = 1 - RUNG_STEP * step
        most = {name: floor[name] + left * max(0.0, obtained[name] - floor[name]) for name in limits}

        def fits(option: Widths, most: Mapping[str, float] = most) -> bool:
            return all(costs[option][name] <= most[name] for name in limits)

        best = best_within(options, error, fits)
        if best is not None and best not in (widths, *found):
            found.append(best)
    return found
