import itertools

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.pruning.allocate import (
    Sensitivities,
    Widths,
    best_within,
    even,
    knapsack,
    per_layer,
    standardised_cut,
    uniform,
    uniform_options,
)
from edgeprune.pruning.compensate import MOMENT_DAMPING, nested_errors
from edgeprune.pruning.moments import gram


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_nested_errors_are_the_least_squares_errors_of_every_width(seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(50, 6, generator=generator) @ torch.randn(6, 6, generator=generator)
    weight, moments = torch.randn(3, 6, generator=generator), gram(inputs)
    order = torch.randperm(6, generator=generator)
    errors = nested_errors(weight, moments, order)
    damped = moments + MOMENT_DAMPING * moments.diagonal().mean() * torch.eye(6)
    for kept_count in range(7):
        kept, removed = order[:kept_count], order[kept_count:]
        schur = damped[removed][:, removed] - damped[removed][:, kept] @ torch.linalg.solve(
            damped[kept][:, kept], damped[kept][:, removed]
        )
        rows = weight.double()[:, removed]
        assert np.isclose(float(errors[kept_count]), float((rows @ schur @ rows.T).trace()), rtol=1e-6, atol=1e-9)


def test_options_are_all_widths_at_the_multiple_and_the_dense_one():
    options = uniform_options(Widths(2, 3, 100), 32)
    assert len(options) == len(set(options)) == 2 * 3 * 4
    assert {widths.intermediate_size for widths in options} == {32, 64, 96, 100}
    assert Widths(2, 3, 100) in options


def sensitivities(seed: int, layers: int = 3) -> Sensitivities:
    """Losses that fall with the width, of layers with 2 groups of 3 heads and 20 channels."""
    generator = np.random.default_rng(seed)
    attention = np.zeros((layers, 3, 3))
    for layer in attention:
        layer[1:] = np.sort(generator.random(6))[::-1].reshape(2, 3)
        layer[0], layer[2, 2] = 1 + generator.random(), 0.0
    mlp = -np.sort(-generator.random((layers, 21)), axis=1)
    mlp[:, -1] = 0.0
    return Sensitivities(attention, mlp, generator.random(3) + 0.5)


FULL = Widths(2, 3, 20)
GONE = Widths(0, 1, 0)


def total(options, picks) -> float:
    return sum(values[pick] for values, pick in zip(options, picks, strict=True))


def cost(widths: Widths) -> int:
    return 10 * widths.num_key_value_heads * (widths.heads_per_group + 1) + 4 * widths.intermediate_size


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), budget=st.integers(1, 200))
def test_the_best_within_a_budget_is_the_least_error_by_brute_force(seed, budget):
    found = sensitivities(seed)
    options = uniform_options(FULL, 5)
    chosen = best_within(options, found.uniform_loss, lambda widths: cost(widths) <= budget)
    feasible = [widths for widths in options if cost(widths) <= budget]
    if not feasible:
        assert chosen is None
    else:
        groups, heads, channels = found.response
        losses = [
            groups * found.attention[:, w[0], -1].sum()
            + heads * (found.attention[:, w[0], w[1] - 1] - found.attention[:, w[0], -1]).sum()
            + channels * found.mlp[:, w[2]].sum()
            for w in feasible
        ]
        assert chosen in feasible
        assert np.isclose(found.uniform_loss(chosen), min(losses))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0.02, 1.1))
def test_the_uniform_choice_is_the_least_loss_by_brute_force(seed, share):
    """Over all widths and all subsets of layers that go."""
    found = sensitivities(seed)
    capacity = int(share * 3 * cost(FULL))
    feasible = [
        [widths if stays else GONE for stays in stay]
        for widths in uniform_options(FULL, 5)
        for stay in itertools.product([True, False], repeat=3)
        if 0 < sum(stay) * cost(widths) <= capacity
    ]
    chosen = uniform(found, FULL, cost, capacity, 5)
    if not feasible:
        assert chosen is None
    else:
        assert sum(map(cost, chosen)) <= capacity
        assert found.loss(chosen) <= min(map(found.loss, feasible)) + 1e-9
        assert len({widths for widths in chosen if widths != GONE}) == 1
    least = int(0.9 * capacity)
    near = [widths for widths in feasible if sum(map(cost, widths)) >= least]
    close = uniform(found, FULL, cost, capacity, 5, least)
    if close is None:  # a choice with fewer layers than fit is never the better one, and is not offered
        assert all(sum(w != GONE for w in widths) < min(3, capacity // cost(max(widths))) for widths in near)
    else:
        assert least <= sum(map(cost, close)) <= capacity
        assert found.loss(close) <= min(map(found.loss, near)) + 1e-9


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0.0, 1.1))
def test_the_per_layer_choice_is_the_least_loss_by_brute_force(seed, share):
    found = sensitivities(seed, layers=2)
    capacity = int(share * 2 * cost(FULL))
    best = np.inf
    for groups, heads in itertools.product((1, 2), (1, 2, 3)):
        options = [Widths(g, heads if g else 1, size) for g in (0, groups) for size in (0, 5, 10, 15, 20)]
        for widths in itertools.product(options, repeat=2):
            if sum(map(cost, widths)) <= capacity:
                best = min(best, found.loss(widths))
    chosen = per_layer(found, FULL, cost, capacity, 5)
    assert sum(map(cost, chosen)) <= capacity
    assert np.isclose(found.loss(chosen), best)
    assert len({w[:2] for w in chosen if w.num_key_value_heads}) <= 1  # head counts stay uniform


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), capacity=st.integers(0, 60))
def test_the_knapsack_is_exact(seed, capacity):
    generator = np.random.default_rng(seed)
    losses = [generator.random(size) for size in (3, 2, 4)]
    costs = [(3 * generator.integers(0, 8, len(loss))).tolist() for loss in losses]
    every = [(total(losses, picks), total(costs, picks)) for picks in itertools.product(*map(range, map(len, losses)))]
    feasible = [loss for loss, used in every if used <= capacity]
    found = knapsack(losses, costs, capacity)
    if not feasible:
        assert found is None
    else:
        assert np.isclose(found[0], min(feasible))
        assert total(costs, found[1]) <= capacity
        assert np.isclose(total(losses, found[1]), found[0])


def test_even_takes_about_the_same_share_of_heads_and_channels():
    capacity = 3 * cost(Widths(4, 4, 1000)) * 7 // 10
    (widths, *rest) = even(Widths(4, 4, 1000), 3, cost, capacity, 10, capacity * 99 // 100)
    assert set(rest) == {widths}
    heads = widths.num_key_value_heads * widths.heads_per_group / 16
    assert abs(heads - widths.intermediate_size / 1000) < 0.1
    assert capacity * 99 // 100 <= 3 * cost(widths) <= capacity
    assert even(Widths(4, 4, 1000), 3, cost, capacity, 10, capacity + 1) is None


def test_the_standardised_cut_keeps_the_highest_scores_that_fit_and_one_of_each():
    groups = [np.array([5.0, -9.0]), np.array([-8.0, -7.0])]
    channels = [np.array([4.0, 3.0, -1.0]), np.array([-2.0, -3.0, -4.0])]
    full, group, channel = Widths(2, 3, 3), cost(Widths(1, 3, 0)), cost(Widths(0, 1, 1))
    least = 2 * (group + channel)
    assert standardised_cut(groups, channels, full, cost, least) == [Widths(1, 3, 1), Widths(1, 3, 1)]
    assert standardised_cut(groups, channels, full, cost, least + 3 * channel) == [Widths(1, 3, 3), Widths(1, 3, 2)]
    everything = standardised_cut(groups, channels, full, cost, 10**6)
    assert everything == [full, full]


def test_predicted_losses_add_up_over_kinds_and_layers():
    found = sensitivities(1)
    widths = Widths(1, 2, 10)
    expected = sum(
        found.response[0] * found.attention[layer, 1, 2]
        + found.response[1] * (found.attention[layer, 1, 1] - found.attention[layer, 1, 2])
        + found.response[2] * found.mlp[layer, 10]
        for layer in range(3)
    )
    assert np.isclose(found.loss([widths] * 3), expected)
    assert np.isclose(found.uniform_loss(widths), expected)
