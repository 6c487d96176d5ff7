import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.pruning.compensate import MOMENT_DAMPING, nested_errors
from edgeprune.pruning.moments import gram
from edgeprune.search.widths import Widths, even, standardised_cut, uniform_options
from tests.support.losses import sensitivities


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


def cost(widths: Widths) -> int:
    return 10 * widths.num_key_value_heads * (widths.heads_per_group + 1) + 4 * widths.intermediate_size


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
