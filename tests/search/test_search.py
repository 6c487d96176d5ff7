"""The search on synthetic costs and qualities: no model, no engine."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.search.search import (
    MAX_CANDIDATES,
    MAX_QUALITY_CANDIDATES,
    CostModel,
    Costs,
    Outcome,
    TrialRise,
    corrected,
    search,
    search_quality,
)
from edgeprune.search.solve import Allocation
from edgeprune.search.widths import Widths, uniform_options

DENSE = Widths(3, 3, 1536)


def size(widths: Widths) -> float:
    """Weights of a layer, in a model of hidden size 576."""
    groups, heads, channels = widths
    return 576 * 64 * 2 * (groups * heads + groups) + 3 * 576 * channels


def loss(widths: Widths) -> float:
    return 3.0 * (1 - widths[0] * widths[1] / 9) + (1 - widths[2] / 1536)


def of(widths: Widths) -> Allocation:
    return Allocation((widths,), 0, loss(widths))


OPTIONS = [of(widths) for widths in uniform_options(DENSE, 32)]
SMALLEST = min(OPTIONS, key=lambda option: size(option.layers[0]))


def estimate(allocation: Allocation) -> dict[str, float]:
    (widths,) = allocation.layers
    return {"decode": size(widths), "memory": size(widths) + 1e5}


def solve(limits: dict[str, float]) -> Allocation | None:
    fits = [o for o in OPTIONS if all(estimate(o)[name] <= limit for name, limit in limits.items())]
    return min(fits, key=lambda option: option.loss, default=None)


def run(
    true_cost: Callable[[Widths], float], limit: float, noise: float = 0.0, seed: int = 0, margin: float = 0.015
) -> Outcome:
    generator = np.random.default_rng(seed)

    def obtain(index: int, allocation: Allocation, predicted: dict[str, float]) -> Costs:
        value = true_cost(allocation.layers[0]) * (1 + noise * generator.standard_normal())
        return Costs({"decode": value}, "met" if value * (1 + 1.96 * noise) <= limit else "missed")

    estimator = corrected(estimate, of(DENSE), {"decode": true_cost(DENSE)})
    return search(solve, SMALLEST, estimator, {"decode": limit}, {"decode": margin}, obtain)


@settings(max_examples=40, deadline=None)
@given(overhead=st.floats(0, 0.4), share=st.floats(0.6, 0.95), bend=st.floats(0.8, 1.2))
def test_it_ends_close_below_a_limit_when_the_estimate_is_wrong(overhead: float, share: float, bend: float) -> None:
    """The true cost has an overhead and a bend that the estimator knows nothing of."""

    def true_cost(widths: Widths) -> float:
        return overhead + (1 - overhead) * (size(widths) / size(DENSE)) ** bend

    smallest = true_cost(SMALLEST.layers[0])
    outcome = run(true_cost, share)
    chosen = outcome.trials[outcome.chosen].obtained
    assert len(outcome.trials) <= MAX_CANDIDATES
    if smallest <= share * 0.985:
        assert chosen.status == "met"
        assert outcome.ending in ("close", "neighbour")
        assert chosen.values["decode"] > 0.93 * share
    elif smallest > share:
        assert outcome.ending == "out_of_reach"


@pytest.mark.parametrize("seed", range(8))
def test_it_meets_the_limit_under_noise(seed: int) -> None:
    outcome = run(lambda widths: 0.1 + 0.9 * size(widths) / size(DENSE), 0.7, noise=0.004, seed=seed)
    assert outcome.trials[outcome.chosen].obtained.status == "met"


def test_an_exact_estimate_needs_one_candidate_and_finds_the_best() -> None:
    limit = 0.8 * size(DENSE)
    outcome = run(size, limit, margin=0.0)
    best = min((o for o in OPTIONS if size(o.layers[0]) <= limit), key=lambda option: option.loss)
    assert [trial.allocation for trial in outcome.trials] == [best]


def test_out_of_reach_gives_the_candidate_nearest_to_the_budget() -> None:
    outcome = run(size, 0.5 * size(SMALLEST.layers[0]))
    assert outcome.ending == "out_of_reach"
    assert outcome.trials[outcome.chosen].allocation == SMALLEST


def test_all_limits_hold_at_once() -> None:
    limits = {"decode": 0.8 * size(DENSE), "memory": 0.7 * (size(DENSE) + 1e5)}

    def obtain(index: int, allocation: Allocation, predicted: dict[str, float]) -> Costs:
        values = estimate(allocation)
        return Costs(values, "met" if all(values[name] <= limits[name] for name in limits) else "missed")

    estimator = corrected(estimate, of(DENSE), estimate(of(DENSE)))
    outcome = search(solve, SMALLEST, estimator, limits, {"decode": 0.0, "memory": 0.0}, obtain)
    chosen = outcome.trials[outcome.chosen].allocation
    fits = [o for o in OPTIONS if all(estimate(o)[name] <= limits[name] for name in limits)]
    assert chosen == min(fits, key=lambda option: option.loss)
    assert [trial.allocation for trial in outcome.trials] == [chosen]


@settings(max_examples=40, deadline=None)
@given(
    overheads=st.tuples(st.floats(0, 0.4), st.floats(0, 0.4)),
    bends=st.tuples(st.floats(0.8, 1.2), st.floats(0.8, 1.2)),
    shares=st.tuples(st.floats(0.4, 1.05), st.floats(0.4, 1.05)),
)
def test_all_limits_hold_at_once_when_every_estimate_is_wrong(
    overheads: tuple[float, float], bends: tuple[float, float], shares: tuple[float, float]
) -> None:
    dense = estimate(of(DENSE))

    def true_cost(allocation: Allocation) -> dict[str, float]:
        return {
            name: overhead + (1 - overhead) * (value / dense[name]) ** bend
            for (name, value), overhead, bend in zip(estimate(allocation).items(), overheads, bends, strict=True)
        }

    limits = dict(zip(dense, shares, strict=True))

    def obtain(index: int, allocation: Allocation, predicted: dict[str, float]) -> Costs:
        values = true_cost(allocation)
        return Costs(values, "met" if all(values[name] <= limits[name] for name in limits) else "missed")

    estimator = corrected(estimate, of(DENSE), true_cost(of(DENSE)))
    outcome = search(solve, SMALLEST, estimator, limits, dict.fromkeys(limits, 0.0), obtain)
    allocations = [trial.allocation for trial in outcome.trials]
    assert len(allocations) == len(set(allocations)) <= MAX_CANDIDATES
    least = true_cost(SMALLEST)
    fits = all(least[name] <= limits[name] for name in limits)
    assert (outcome.trials[outcome.chosen].obtained.status == "met") == fits
    assert (outcome.ending == "out_of_reach") == (not fits)


def test_a_candidate_that_failed_is_not_proposed_again() -> None:
    """It is below the limit, and its interval is not: a smaller one follows, until one is met."""
    limit = 0.8 * size(DENSE)
    seen: list[Allocation] = []

    def obtain(index: int, allocation: Allocation, predicted: dict[str, float]) -> Costs:
        seen.append(allocation)
        return Costs({"decode": size(allocation.layers[0])}, "noisy" if index < 2 else "met")

    estimator = corrected(estimate, of(DENSE), {"decode": size(DENSE)})
    outcome = search(solve, SMALLEST, estimator, {"decode": limit}, {"decode": 0.0}, obtain)
    assert len(seen) == len(set(seen)) == 3
    sizes = [size(allocation.layers[0]) for allocation in seen]
    assert sizes == sorted(sizes, reverse=True)
    assert outcome.trials[outcome.chosen].allocation == seen[2]


def test_a_candidate_that_failed_although_it_is_estimated_to_cost_nothing_ends_the_search() -> None:
    """As where a tiny model's times are lost in noise: no limit is below its estimate."""
    free = of(Widths(1, 1, 32))

    def estimate_of(allocation: Allocation) -> dict[str, float]:
        return {"decode": 0.0 if allocation == free else 1.0}

    estimator = corrected(estimate_of, of(DENSE), {"decode": 1.0})
    missed = Costs({"decode": 0.9}, "missed")
    outcome = search(lambda limits: free, free, estimator, {"decode": 0.5}, {"decode": 0.0}, lambda *_: missed)
    assert (outcome.ending, len(outcome.trials)) == ("out_of_reach", 1)


def test_the_cost_model_passes_through_what_was_obtained() -> None:
    model = CostModel(10.0, 20.0)
    assert model.predict(5.0) == 10.0
    model.correct(5.0, 12.0)
    assert model.predict(5.0) == 12.0
    assert model.predict(7.5) == pytest.approx(16.0)
    assert model.predict(2.5) == pytest.approx(8.0)


def test_the_cost_model_does_not_follow_noise_downhill() -> None:
    model = CostModel(10.0, 20.0)
    model.correct(9.9, 20.5)
    assert model.predict(5.0) < 20.0


def test_a_candidate_that_is_estimated_to_cost_nothing_scales_no_other_one() -> None:
    """As in a tiny model on a busy machine: no width was seen to cost anything, and later ones took less."""
    model = CostModel(10.0, 20.0)
    model.correct(0.0, 21.0)
    assert model.predict(4.0) == 8.0
    assert model.predict(0.0) == 0.0
    assert model.room(10.0) == pytest.approx(5.0)
    assert CostModel(0.0, 20.0).predict(4.0) == 20.0
    assert CostModel(0.0, 20.0).room(10.0) == 0.0


@given(
    points=st.lists(st.tuples(st.floats(1, 100), st.floats(0.5, 2.0)), min_size=1, max_size=4), limit=st.floats(1, 150)
)
def test_the_room_is_the_largest_estimate_within_a_limit(points: list[tuple[float, float]], limit: float) -> None:
    """Where what was obtained rises with the estimate, as costs do."""
    points = sorted(points)
    obtained = np.cumsum([step for _, step in points]) + [x for x, _ in points]
    model = CostModel(points[0][0], float(obtained[0]))
    for (x, _), y in zip(points[1:], obtained[1:], strict=True):
        model.correct(x, float(y))
    room = model.room(limit)
    if room > 0:
        assert model.predict(room) <= limit * (1 + 1e-6)
    if room < 2 * max(x for x, _ in points):
        assert model.predict(room * 1.01 + 1e-3) > limit * (1 - 1e-6)


def quality(true_rise: Callable[[float], float], limit: float):
    """Trials of the search for the smallest model within `limit` nats; losses are shares of the way to the budget."""
    proposed: list[Allocation] = []

    def at(share: float) -> Allocation:
        return Allocation((Widths(1, 1, round(1000 * share)),), 0, round(1000 * share) / 1000)

    def obtain(index: int, allocation: Allocation) -> TrialRise:
        proposed.append(allocation)
        rise = true_rise(allocation.loss)
        return TrialRise(rise, "met" if rise <= limit else "missed")

    beyond = at(1.0)
    trials = search_quality(at, limit, (beyond, TrialRise(true_rise(1.0), "missed")), obtain)
    assert beyond not in proposed
    assert len(trials) == len(proposed) == len(set(proposed)) <= MAX_QUALITY_CANDIDATES
    return trials


@settings(deadline=None)
@given(scale=st.floats(0.3, 3.0), bend=st.floats(0.8, 1.6), part=st.floats(0.1, 0.9))
def test_the_quality_search_ends_below_the_limit_and_near_it(scale: float, bend: float, part: float) -> None:
    limit = part * scale
    trials = quality(lambda loss: scale * loss**bend, limit)
    met = [trial for trial in trials if trial.rise.status == "met"]
    assert met
    best = max(met, key=lambda trial: trial.share)
    assert best.rise.nats >= 0.5 * limit


def test_a_budget_far_beyond_the_limit_does_not_end_the_quality_search() -> None:
    """Broken models lose about as much as each other: a line through two of them meets the limit nowhere."""
    trials = quality(lambda loss: 2.4 * loss / (loss + 0.05), 0.26)
    assert trials[0].rise.status == "missed"
    assert any(trial.rise.status == "met" for trial in trials)


def test_a_quality_limit_that_no_step_reaches_is_given_up() -> None:
    assert all(trial.rise.status == "missed" for trial in quality(lambda loss: 0.5 + loss, 0.1))
