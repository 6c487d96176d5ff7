"""The search for a candidate: propose an allocation, obtain its costs, correct the prediction, decide when to end.

It knows numbers only: allocations, their predicted loss and costs, and limits. The costs of a candidate and the
quality that it loses come from the caller, who prunes, builds, measures and evaluates it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from edgeprune.search.solve import Allocation

MAX_CANDIDATES = 5
MAX_QUALITY_CANDIDATES = 3
RUNG_CANDIDATES = 2  # for each rung of a frontier, which begins with the corrections of the rungs before
CLOSE = 0.03  # a candidate that uses all but this share of a limit ends the search
QUALITY_CLOSE = 0.2  # a candidate that uses all but this share of the quality limit ends that search
QUALITY_MARGIN = 0.05  # share of the quality limit to stay below: a prediction of quality is rough
NUDGE = 1e-3  # share to stay below the estimate of a candidate that failed though it was predicted to fit

Status = Literal["met", "missed", "noisy"]
Ending = Literal["close", "neighbour", "out_of_reach", "candidates"]
Solve = Callable[[Mapping[str, float]], Allocation | None]  # returns the best one within limits on the estimates


@dataclass(frozen=True)
class Costs:
    """The obtained costs of a candidate by constraint, in the constraint's unit, and whether the limits hold."""

    values: dict[str, float]
    status: Status


@dataclass(frozen=True)
class Trial:
    """A candidate of the search, with its predicted and its obtained costs."""

    allocation: Allocation
    predicted: dict[str, float]
    obtained: Costs


@dataclass(frozen=True)
class Outcome:
    """The trials in order, the index of the chosen one, and why the search ended (as a word and as a sentence)."""

    trials: tuple[Trial, ...]
    chosen: int
    ending: Ending
    reason: str


class CostModel:
    """A correction of one estimated cost: lines between the points (estimated, obtained) so far.

    With one point the estimate is scaled; beyond the outermost points the outermost line is prolonged.
    """

    def __init__(self, estimated: float, obtained: float) -> None:
        self._points = {estimated: obtained}

    def correct(self, estimated: float, obtained: float) -> None:
        """Adds a point."""
        self._points[estimated] = obtained

    def predict(self, estimated: float) -> float:
        """Returns the cost that is expected where this one is estimated."""
        # The line between the two points around the estimate, where it rises.
        xs = sorted(self._points)
        if len(xs) > 1:
            right = int(np.clip(np.searchsorted(xs, estimated), 1, len(xs) - 1))
            low, high = xs[right - 1], xs[right]
            slope = (self._points[high] - self._points[low]) / (high - low)
            if slope > 0:
                return self._points[low] + slope * (estimated - low)
        # Else the estimate, scaled as that of the nearest point; one that was estimated to cost nothing has no scale.
        if not (scaled := [x for x in xs if x > 0]):
            return self._points[xs[0]]
        nearest = min(scaled, key=lambda x: abs(x - estimated))
        return self._points[nearest] * estimated / nearest

    def room(self, limit: float) -> float:
        """Returns the largest estimate that is predicted to stay within a limit, by bisection; 0 where none does."""
        low, high = 0.0, 2 * max(self._points)
        if self.predict(high) <= limit:
            return high
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self.predict(middle) <= limit else (low, middle)
        return low


@dataclass(frozen=True)
class Corrected:
    """The estimator of a run, with a correction for each constraint."""

    estimate: Callable[[Allocation], Mapping[str, float]]
    models: dict[str, CostModel]

    def predict(self, allocation: Allocation) -> dict[str, float]:
        """Returns the corrected costs of an allocation by constraint."""
        estimated = self.estimate(allocation)
        return {name: model.predict(estimated[name]) for name, model in self.models.items()}

    def correct(self, allocation: Allocation, values: Mapping[str, float]) -> None:
        """Corrects all models by the obtained costs of an allocation."""
        estimated = self.estimate(allocation)
        for name, model in self.models.items():
            model.correct(estimated[name], values[name])

    def room(self, limits: Mapping[str, float]) -> dict[str, float]:
        """Returns the limits on the estimates that keep the obtained costs within these limits."""
        return {name: self.models[name].room(limit) for name, limit in limits.items()}


def corrected(
    estimate: Callable[[Allocation], Mapping[str, float]], dense: Allocation, obtained: Mapping[str, float]
) -> Corrected:
    """Returns an estimator that is corrected by the obtained costs of the dense model."""
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
    """Searches the allocation of the least loss within all limits, with at most `most` candidates.

    solve: returns the best allocation within limits on the estimates, None where none fits; smallest: the allocation
    that is tried where none is predicted to fit; estimator: corrected by every candidate; limits: by constraint;
    margins: share of each limit to stay below, for the noise of measurements; obtain(index, allocation, predicted):
    prunes, builds and measures a candidate. Returns all trials with the chosen one: of those that meet the limits the
    one of least loss, else the one that exceeds them least.
    """
    trials: dict[Allocation, Trial] = {}
    allowed: dict[str, float] = {}  # estimates that turned out to be too much

    def usage(values: Mapping[str, float]) -> float:
        return max(values[name] / limits[name] for name in limits)

    ending, reason = "candidates", f"{most} candidates were tried"
    while len(trials) < most:
        # Propose the best allocation that is predicted to fit, else the smallest one.
        room = estimator.room({name: limit * (1 - margins[name]) for name, limit in limits.items()})
        proposed = solve({name: min(value, allowed.get(name, value)) for name, value in room.items()})
        if proposed is None:
            proposed = smallest
            if proposed.choice in trials:
                ending, reason = "out_of_reach", "the smallest candidate exceeds the budget"
                break
        # A proposal that was tried before ends the search, or is excluded where it failed.
        if (trial := trials.get(proposed.choice)) is not None:
            if trial.obtained.status == "met":
                ending, reason = "neighbour", "every better candidate on the width grid exceeds the budget"
                break
            name = max(limits, key=lambda name: trial.obtained.values[name] / limits[name])
            lower = estimator.estimate(proposed)[name] * (1 - NUDGE)
            if lower >= allowed.get(name, np.inf):  # an estimate of nothing
                ending, reason = "out_of_reach", "nothing is predicted to cost less than a candidate beyond the budget"
                break
            allowed[name] = lower
            continue
        # Obtain the costs of a new candidate, and correct the estimator by them.
        predicted = {name: value for name, value in estimator.predict(proposed).items() if name in limits}
        trial = Trial(proposed, predicted, obtain(len(trials), proposed, predicted))
        trials[proposed.choice] = trial
        estimator.correct(proposed, trial.obtained.values)
        used = usage(trial.obtained.values)
        if trial.obtained.status == "met" and used >= 1 - CLOSE:
            ending, reason = "close", f"the candidate uses {100 * used:.1f} % of the budget"
            break
    # Choose among the trials.
    order = list(trials.values())
    met = [trial for trial in order if trial.obtained.status == "met"]
    if met:
        best = min(met, key=lambda trial: trial.allocation.loss)
    else:
        best = min(order, key=lambda trial: usage(trial.obtained.values))
    return Outcome(tuple(order), order.index(best), ending, reason)


@dataclass(frozen=True)
class TrialRise:
    """The rise of a candidate's log perplexity in nats per token, and whether the quality limit holds.

    nats: the upper bound of the rise on the worst text.
    """

    nats: float
    status: Status


@dataclass(frozen=True)
class QualityTrial:
    """A candidate of the search for quality; share: of the way from the dense model (0) to the budget (1)."""

    allocation: Allocation
    share: float
    rise: TrialRise


def search_quality(
    at: Callable[[float], Allocation | None],
    limit: float,
    beyond: tuple[Allocation, TrialRise],
    obtain: Callable[[int, Allocation], TrialRise],
) -> tuple[QualityTrial, ...]:
    """Searches the smallest model whose quality is within a limit that the budget's own candidate exceeds.

    at(share): returns the best allocation within limits at this share of the way from the dense model to the budget;
    limit: nats per token; beyond: the budget's candidate; obtain(index, allocation): prunes, builds, measures and
    evaluates a candidate. Predicted rises are corrected by the obtained ones as costs are. Returns the trials in
    order; of those that meet the limit, the one of the largest share is the smallest model that the quality allows.
    """
    allocation, rise = beyond
    model = CostModel(max(allocation.loss, 1e-9), max(rise.nats, 1e-9))
    model.correct(0.0, 0.0)  # the dense model; a rise far beyond the limit says little about small ones
    trials: list[QualityTrial] = []
    seen = {allocation.choice}
    for index in range(MAX_QUALITY_CANDIDATES):
        # Propose the smallest model that is predicted to keep the limit.
        proposed = _furthest(at, lambda loss: model.predict(loss) <= limit * (1 - QUALITY_MARGIN))
        if proposed is None or proposed[1].choice in seen:
            break
        share, allocation = proposed
        seen.add(allocation.choice)
        # Obtain its rise, and correct the prediction by it.
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
    """Returns the largest share whose allocation's loss is allowed, within 1/256 of the way, with that allocation."""
    low, high, best = 0.0, 1.0, None
    for _ in range(8):
        middle = (low + high) / 2
        allocation = at(middle)
        if allocation is not None and allowed(allocation.loss):
            low, best = middle, (middle, allocation)
        else:
            high = middle
    return best
