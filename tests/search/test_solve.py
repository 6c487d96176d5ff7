"""The exact choice of widths, against brute force on small models with random losses and costs."""

import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgeprune.search.module_costs import ModuleCosts
from edgeprune.search.solve import GONE, Problem, per_layer, uniform
from edgeprune.search.widths import Widths, uniform_options
from tests.support.losses import sensitivities

FULL = Widths(2, 3, 20)
VOCABULARIES = {100: 0.0, 40: 0.1}


def random_costs(generator: np.random.Generator) -> ModuleCosts:
    """Costs that grow with the width, not in proportion to it."""
    attention = np.zeros((3, 3))
    attention[1:] = np.sort(1 + 10 * generator.random(6)).reshape(2, 3)
    mlp = np.concatenate([[0.0], np.sort(1 + 20 * generator.random(20))])
    peaks = np.sort(5 * generator.random(3)), np.sort(5 * generator.random(21))
    peaks[0][0] = peaks[1][0] = 0.0
    return ModuleCosts(attention, mlp, np.tile(peaks[0][:, None], (1, 3)), peaks[1], 3.0, 0.05)


def problem_of(seed: int, layers: int) -> Problem:
    generator = np.random.default_rng(seed)
    costs = {name: random_costs(generator) for name in ("memory", "prefill", "decode")}
    return Problem(FULL, sensitivities(seed, layers), costs, 5, VOCABULARIES)


def limits_of(problem: Problem, shares: list[float]) -> dict[str, float]:
    return {name: share * cost for (name, cost), share in zip(dense_cost(problem).items(), shares, strict=True)}


def dense_cost(problem: Problem) -> dict[str, float]:
    return problem.estimate(problem.everything)


def least(problem: Problem, limits: dict[str, float], layouts) -> float:
    """The least loss of any layout within the limits, inf where there is none."""
    best = np.inf
    for layers in layouts:
        for tokens, more in problem.vocabularies.items():
            if all(cost.total(layers, tokens) <= limits[name] + 1e-9 for name, cost in problem.costs.items()):
                best = min(best, problem.sensitivities.loss(layers) + more)
    return best


SHARES = st.lists(st.floats(0.1, 1.1), min_size=3, max_size=3)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), shares=SHARES)
@example(seed=27, shares=[1.0, 1.0, 1.0])  # the dense model just fits, but for the order of a sum
def test_the_uniform_choice_is_the_least_loss_by_brute_force(seed, shares):
    """Over all widths, all subsets of layers that go, and both vocabularies, under three limits at once."""
    problem = problem_of(seed, layers=3)
    limits = limits_of(problem, shares)
    layouts = [
        tuple(widths if stays else GONE for stays in stay)
        for widths in uniform_options(FULL, 5)
        for stay in itertools.product([True, False], repeat=3)
        if any(stay)
    ]
    best, chosen = least(problem, limits, layouts), uniform(problem, limits)
    if chosen is None:
        assert best == np.inf
    else:
        assert chosen.loss == pytest.approx(best)
        assert all(value <= limits[name] + 1e-9 for name, value in problem.estimate(chosen).items())
        loss = problem.sensitivities.loss(chosen.layers) + problem.vocabularies[chosen.vocab_size]
        assert loss == pytest.approx(chosen.loss)
        assert len({widths for widths in chosen.layers if widths != GONE}) == 1


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), shares=SHARES)
def test_the_per_layer_choice_is_the_least_loss_by_brute_force(seed, shares):
    """Where peaks do not depend on the size: those of the knapsack are of the largest size."""
    problem = problem_of(seed, layers=2)
    for cost in problem.costs.values():
        cost.mlp_peak[:] = 0.0
        cost.attention_peak[:] = 0.0
    limits = limits_of(problem, shares)
    layouts = []
    for groups, heads in itertools.product((1, 2), (1, 2, 3)):
        options = [Widths(g, heads if g else 1, size) for g in (0, groups) for size in (0, 5, 10, 15, 20)]
        for layers in itertools.product(options, repeat=2):
            if any(w.num_key_value_heads for w in layers) and any(w.intermediate_size for w in layers):
                layouts.append(layers)
    best, chosen = least(problem, limits, layouts), per_layer(problem, limits)
    if chosen is None:
        assert best == np.inf
    else:
        assert chosen.loss == pytest.approx(best, rel=2e-4)
        assert all(value <= limits[name] * (1 + 1e-6) for name, value in problem.estimate(chosen).items())
        assert len({w[:2] for w in chosen.layers if w.num_key_value_heads}) == 1  # head counts stay uniform


def test_the_per_layer_choice_meets_a_limit_with_peaks():
    problem = problem_of(3, layers=4)
    limits = limits_of(problem, [0.6, 0.7, 0.8])
    chosen = per_layer(problem, limits)
    assert all(value <= limits[name] * (1 + 1e-6) for name, value in problem.estimate(chosen).items())


def test_without_a_limit_that_binds_everything_stays():
    problem = problem_of(0, layers=3)
    limits = limits_of(problem, [1.001, 1.001, 1.001])
    for solve in (uniform, per_layer):
        assert solve(problem, limits).loss == pytest.approx(0.0)
    assert uniform(problem, limits).layers == problem.everything.layers


def test_the_smallest_keeps_the_layer_that_is_missed_most():
    problem = problem_of(1, layers=4)
    chosen = problem.smallest
    (place,) = [place for place, widths in enumerate(chosen.layers) if widths != GONE]
    assert chosen.layers[place] == Widths(1, 1, 5)
    assert chosen.vocab_size == 40
    one = [tuple(Widths(1, 1, 5) if n == kept else GONE for n in range(4)) for kept in range(4)]
    assert place == int(np.argmin([problem.sensitivities.loss(layers) for layers in one]))
