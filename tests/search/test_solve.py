"""The exact choice of widths, against brute force on small models with random losses and costs."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgeprune.precision import CACHE_FORMATS, WEIGHT_FORMATS
from edgeprune.search.module_costs import ModuleCosts
from edgeprune.search.solve import GONE, Allocation, Problem, per_layer, uniform
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
    tables = np.array([[[3.0, 0.05]]])
    return ModuleCosts(attention[None], mlp[None], np.tile(peaks[0][:, None], (1, 3)), peaks[1], tables)


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


FORMATS = (None, WEIGHT_FORMATS["int8"], WEIGHT_FORMATS["int4-32"])


def problem_with_formats(seed: int, layers: int, tied: bool) -> Problem:
    """A problem of three formats; one of them does not take some widths, and no table takes another."""
    generator = np.random.default_rng(seed)
    costs = {}
    for name in ("memory", "decode"):
        floats = random_costs(generator)
        shares = 1 - 0.4 * np.arange(3) * generator.random(3)
        attention = shares[:, None, None] * floats.attention
        mlp = shares[:, None] * floats.mlp
        attention[2, 1, 1] = mlp[2, 10] = np.inf
        tables = shares[:, None, None] * shares[None, :, None] * floats.tables[0, 0]
        costs[name] = ModuleCosts(attention, mlp, 0 * floats.attention_peak, 0 * floats.mlp_peak, tables)
    return Problem(FULL, sensitivities(seed, layers), costs, 10, VOCABULARIES, FORMATS, (0, 1, 2), (0, 1), tied)


def every_allocation(problem: Problem, joint: bool):
    """All allocations of a small problem."""
    modules = {0: [None], 1: list(FORMATS)}
    for pair in itertools.product((1, 2), (1, 2, 3)):
        sizes = [0, 10, 20]
        options = [
            (Widths(*(pair if stays else (0, 1)), size), (attention, mlp))
            for stays in (0, 1)
            for size in sizes
            for attention in modules[stays]
            for mlp in modules[size > 0]
            if not joint or bool(stays) == (size > 0)
        ]
        for layers in itertools.product(options, repeat=problem.depth):
            widths = tuple(width for width, _ in layers)
            kept = {size for *_, size in widths if size}
            if not kept or not any(width.num_key_value_heads for width in widths) or (joint and len(kept) > 1):
                continue
            for tokens in problem.vocabularies:
                for head in FORMATS[:2]:
                    for embedding in (head,) if problem.tied else FORMATS[:2]:
                        formats = tuple(form for _, form in layers)
                        yield Allocation(widths, tokens, 0.0, formats, (embedding, head))


@pytest.mark.slow
@settings(max_examples=6, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    shares=st.lists(st.floats(0.15, 1.0), min_size=2, max_size=2),
    tied=st.booleans(),
    joint=st.booleans(),
)
def test_widths_and_formats_together_are_the_least_loss_by_brute_force(seed, shares, tied, joint):
    problem = problem_with_formats(seed, 2, tied)
    limits = limits_of(problem, shares)
    best = np.inf
    for allocation in every_allocation(problem, joint):
        values = problem.estimate(allocation)
        if all(values[name] <= limits[name] + 1e-9 for name in limits):
            best = min(best, problem.loss(allocation))
    chosen = (uniform if joint else per_layer)(problem, limits)
    if chosen is None:
        assert best == np.inf
    else:
        assert chosen.loss == pytest.approx(best, rel=2e-3)
        assert chosen.loss == pytest.approx(problem.loss(chosen))
        assert all(value <= limits[name] + 1e-9 for name, value in problem.estimate(chosen).items())


INT8, FP8 = CACHE_FORMATS["int8"], CACHE_FORMATS["fp8"]


def with_caches(problem: Problem, seed: int) -> Problem:
    """The same with a KV cache that may have a format: each cheaper or dearer in every attention, by constraint."""
    generator = np.random.default_rng(seed)
    caches = {
        cache: {
            name: replace(cost, attention=cost.attention * (generator.uniform(0.3, 1.2) if cache else 1.0))
            for name, cost in problem.costs.items()
        }
        for cache in (None, INT8, FP8)
    }
    return replace(problem, caches=caches)


@pytest.mark.parametrize("seed", range(6))
def test_the_format_of_the_cache_is_that_of_least_loss_by_brute_force(seed):
    problem = with_caches(problem_of(seed, layers=2), seed)
    limits = limits_of(problem, [0.5 + 0.08 * seed] * 3)
    best = None
    for widths in uniform_options(FULL, 5):
        for layers in ((widths, widths), (widths, GONE), (GONE, widths)):
            for tokens, cache in itertools.product(VOCABULARIES, problem.cache_formats):
                one = Allocation(layers, tokens, 0.0, cache=cache)
                if all(value <= limits[name] + 1e-9 for name, value in problem.estimate(one).items()):
                    one = replace(one, loss=problem.loss(one))
                    best = one if best is None or one.loss < best.loss else best
    chosen = uniform(problem, limits)
    assert chosen.loss == pytest.approx(best.loss)
    assert chosen.cache == best.cache


def test_the_cache_stays_in_floats_where_the_budget_is_met_with_them():
    problem = with_caches(problem_of(3, layers=2), 3)
    chosen = per_layer(problem, limits_of(problem, [1.0] * 3))
    assert chosen.cache is None
    assert chosen.loss == 0.0
    only = replace(problem, caches={INT8: problem.caches[INT8]})
    forced = per_layer(only, {name: 2 * limit for name, limit in limits_of(problem, [1.0] * 3).items()})
    assert forced.cache == INT8
    assert forced.loss == pytest.approx(only.sensitivities.caches["int8"].by_layer.sum())
    assert only.smallest.cache == INT8
    assert "KV cache in int8" in str(forced)


@pytest.mark.parametrize("seed", range(4))
def test_the_smallest_has_the_cache_that_takes_the_least_memory(seed):
    """Codes that are held twice may take more than floats that are held once."""
    problem = with_caches(problem_of(seed, layers=2), seed)
    smallest = problem.smallest
    held = {cache: problem.estimate(replace(smallest, cache=cache))["memory"] for cache in problem.caches}
    assert held[smallest.cache] == min(held.values())


def test_a_layer_without_attention_loses_nothing_by_its_cache():
    problem = with_caches(problem_of(3, layers=2), 3)
    first = replace(problem.everything, layers=(Widths(0, 1, 20), FULL), cache=INT8)
    both = replace(first, cache=None)
    of_layers = problem.sensitivities.caches["int8"].by_layer
    assert problem.loss(first) - problem.loss(both) == pytest.approx(of_layers[1])


def test_formats_that_are_not_offered_are_not_chosen():
    problem = problem_with_formats(5, 2, tied=True)
    only = replace(problem, layer_formats=(1,), table_formats=(0,))
    chosen = uniform(only, limits_of(problem, [1.0, 1.0]))
    assert {form for pair in chosen.formats for form in pair} == {FORMATS[1]}
    assert chosen.tables == (None, None)
    smallest = only.smallest
    assert smallest.tables == (None, None)
    assert set(smallest.formats) == {(FORMATS[1], FORMATS[1])}


def test_the_smallest_has_widths_that_the_formats_take():
    """Where there is one format, and its groups divide neither the fewest heads nor the fewest channels."""
    problem = replace(problem_with_formats(5, 2, tied=True), layer_formats=(2,))
    for cost in problem.costs.values():
        cost.attention[2, 1, :] = np.inf
    smallest = problem.smallest
    assert {widths for widths in smallest.layers if widths.num_key_value_heads} == {Widths(2, 1, 20)}
    assert set(smallest.formats) == {(FORMATS[2], FORMATS[2])}


def test_the_smallest_has_formats_that_its_widths_take():
    problem = problem_with_formats(5, 2, tied=True)
    assert set(problem.smallest.formats) == {(FORMATS[2], FORMATS[1])}  # 10 channels are no whole group
    for cost in problem.costs.values():
        cost.attention[2, 1, 0] = cost.tables[1, 1] = np.inf  # one head of fewer inputs than a group has
    smallest = problem.smallest
    assert set(smallest.formats) == {(FORMATS[1], FORMATS[1])}
    assert smallest.tables == (None, None)
    assert all(np.isfinite(value) for value in problem.estimate(smallest).values())


def test_experts_have_one_symmetric_format_in_all_layers():
    problem = replace(problem_with_formats(3, 2, tied=True), one_mlp_format=True)
    limits = limits_of(problem, [0.8, 0.8])

    def formats_of_mlps(allocation: Allocation) -> set:
        pairs = allocation.formats or ((None, None),) * problem.depth
        return {mlp for (_, mlp), widths in zip(pairs, allocation.layers, strict=True) if widths.intermediate_size}

    best = np.inf
    for allocation in every_allocation(problem, joint=True):
        values = problem.estimate(allocation)
        if len(formats_of_mlps(allocation)) == 1 and all(values[name] <= limits[name] for name in limits):
            best = min(best, problem.loss(allocation))
    chosen = uniform(problem, limits)
    assert chosen.loss == pytest.approx(best, rel=2e-3)
    assert len(formats_of_mlps(chosen)) == 1
    asymmetric = replace(problem, formats=(None, FORMATS[1], WEIGHT_FORMATS["int4-32-asymmetric"]))
    assert asymmetric.mlp_formats == (0, 1)
    assert formats_of_mlps(asymmetric.smallest) == {FORMATS[1]}


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
        assert chosen.loss == pytest.approx(best, rel=2e-3)
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
