"""The search: propose an allocation, obtain what it costs, correct the prediction, end by the rule.

It sees numbers only: allocations, their predicted loss and cost, and limits. What a candidate really costs, and
how much quality it loses, comes from the caller, who prunes, builds, measures and evaluates it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from edgeprune.search.solve import Allocation

MAX_CANDIDATES = 5
MAX_QUALITY_CANDIDATES = 3
RUNG_CANDIDATES = 2  # for each rung of a frontier: the corrections of one serve the next
CLOSE = 0.03  # a candidate that uses all but this share of a limit ends the search
QUALITY_CLOSE = 0.2  # a candidate that uses all but this share of the quality limit ends that search
QUALITY_MARGIN = 0.05  # share of the quality limit to stay below: a prediction of quality is rough
NUDGE = 1e-3  # below the prediction of a candidate that failed though it was predicted to fit

Status = Literal["met", "missed", "noisy"]
Ending = Literal["close", "neighbour", "out_of_reach", "candidates"]
Solve = Callable[[Mapping[str, float]], Allocation | None]  # the best one within limits on the estimates


@dataclass(frozen=True)
class Costs:
    """What a candidate costs, by constraint, in the constraint's unit, and whether the limits hold."""

    values: dict[str, float]
    status: Status


@dataclass(frozen=True)
class Trial:
    allocation: Allocation
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

    def room(self, limit: float) -> float:
        """The largest estimate that is predicted to stay within a limit, by bisection; 0 where none does."""
        low, high = 0.0, 2 * max(self._points)
        if self.predict(high) <= limit:
            return high
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self.predict(middle) <= limit else (low, middle)
        return low


@dataclass(frozen=True)
class Corrected:
    """The estimator of a run, with a model by constraint of how what is obtained departs from it."""

    estimate: Callable[[Allocation], Mapping[str, float]]
    models: dict[str, CostModel]

    def predict(self, allocation: Allocation) -> dict[str, float]:
        estimated = self.estimate(allocation)
        return {name: model.predict(estimated[name]) for name, model in self.models.items()}

    def correct(self, allocation: Allocation, values: Mapping[str, float]) -> None:
        estimated = self.estimate(allocation)
        for name, model in self.models.items():
            model.correct(estimated[name], values[name])

    def room(self, limits: Mapping[str, float]) -> dict[str, float]:
        """Limits on the estimates that stand for limits on what is obtained."""
        return {name: self.models[name].room(limit) for name, limit in limits.items()}


def corrected(
    estimate: Callable[[Allocation], Mapping[str, float]], dense: Allocation, obtained: Mapping[str, float]
) -> Corrected:
    """An estimator that is right about the dense model."""
    estimated = estimate(dense)
    return Corrected(estimate, {name: CostModel(estimated[name], value) for name, value in obtained.items()})


def search(
    solve: Solve,
    smallest: Allocation,
    estimator: Corrected,
    limits: Mapping[str, float],
    margins: Mapping[str, float],
    obtain: Callable[[int, Allocation, dict[str, float]], Costs],
    most: int = MAX_CANDIDATES,
) -> Outcome:
    """The allocation of the least loss within all limits, in at most `most` candidates.

    smallest: what is tried where nothing is predicted to fit. margins: share of each limit to stay below, for
    the noise of a measurement. obtain(index, allocation, predicted) prunes, builds and measures. The estimator
    is corrected by every candidate.
    """
    trials: dict[tuple, Trial] = {}
    allowed: dict[str, float] = {}  # estimates that turned out to be too much

    def usage(values: Mapping[str, float]) -> float:
        return max(values[name] / limits[name] for name in limits)

    ending, reason = "candidates", f"{most} candidates were tried"
    while len(trials) < most:
        room = estimator.room({name: limit * (1 - margins[name]) for name, limit in limits.items()})
        proposed = solve({name: min(value, allowed.get(name, value)) for name, value in room.items()})
        if proposed is None:
            proposed = smallest
            if _key(proposed) in trials:
                ending, reason = "out_of_reach", "the smallest candidate exceeds the budget"
                break
        if (trial := trials.get(_key(proposed))) is not None:
            if trial.obtained.status == "met":
                ending, reason = "neighbour", "every better candidate on the width grid exceeds the budget"
                break
            name = max(limits, key=lambda name: trial.obtained.values[name] / limits[name])
            allowed[name] = estimator.estimate(proposed)[name] * (1 - NUDGE)
            continue
        predicted = {name: value for name, value in estimator.predict(proposed).items() if name in limits}
        trial = Trial(proposed, predicted, obtain(len(trials), proposed, predicted))
        trials[_key(proposed)] = trial
        estimator.correct(proposed, trial.obtained.values)
        used = usage(trial.obtained.values)
        if trial.obtained.status == "met" and used >= 1 - CLOSE:
            ending, reason = "close", f"the candidate uses {100 * used:.1f} % of the budget"
            break
    order = list(trials.values())
    met = [trial for trial in order if trial.obtained.status == "met"]
    if met:
        best = min(met, key=lambda trial: trial.allocation.loss)
    else:
        best = min(order, key=lambda trial: usage(trial.obtained.values))
    return Outcome(tuple(order), order.index(best), ending, reason)


def _key(allocation: Allocation) -> tuple:
    return allocation.layers, allocation.vocab_size


@dataclass(frozen=True)
class TrialRise:
    """A candidate's rise of log perplexity on the worst text in nats per token, by its upper bound, and whether
    the quality limit holds."""

    nats: float
    status: Status


@dataclass(frozen=True)
class QualityTrial:
    """share: of the way from the dense model (0) to the budget (1)."""

    allocation: Allocation
    share: float
    rise: TrialRise


def search_quality(
    at: Callable[[float], Allocation | None],
    limit: float,
    beyond: tuple[Allocation, TrialRise],
    obtain: Callable[[int, Allocation], TrialRise],
) -> tuple[QualityTrial, ...]:
    """The smallest model whose quality is within a limit that the budget's own candidate exceeds.

    at(share): the best allocation within limits at this share of the way from the dense model to the budget;
    limit: nats per token; beyond: the budget's candidate. obtain prunes, builds, measures and evaluates. The
    trials in order; the last share that was met is the nearest that the quality allows. Predicted and
    obtained rises are brought together as costs are.
    """
    allocation, rise = beyond
    model = CostModel(max(allocation.loss, 1e-9), max(rise.nats, 1e-9))
    trials: list[QualityTrial] = []
    seen = {_key(allocation)}
    for index in range(MAX_QUALITY_CANDIDATES):
        found = _furthest(at, lambda loss: model.predict(loss) <= limit * (1 - QUALITY_MARGIN))
        if found is None or _key(found[1]) in seen:
            break
        share, allocation = found
        seen.add(_key(allocation))
        rise = obtain(index, allocation)
        trials.append(QualityTrial(allocation, share, rise))
        if allocation.loss > 0:
            model.correct(allocation.loss, max(rise.nats, 1e-9))
        if rise.status == "met" and rise.nats >= limit * (1 - QUALITY_CLOSE):
            break
    return tuple(trials)


def _furthest(
    at: Callable[[float], Allocation | None], allowed: Callable[[float], bool]
) -> tuple[float, Allocation] | None:
    """The largest share whose allocation's loss is allowed, within 1/256 of the way."""
    low, high, best = 0.0, 1.0, None
    for _ in range(8):
        middle = (low + high) / 2
        allocation = at(middle)
        if allocation is not None and allowed(allocation.loss):
            low, best = middle, (middle, allocation)
        else:
            high = middle
    return best
