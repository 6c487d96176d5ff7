"""Costs by module: sums, peaks, and the widths that an MLP may have."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.search.module_costs import ModuleCosts, Widths, additive, channel_options

GROUPS, HEADS, CHANNELS = 2, 3, 5


def tables(seed: int) -> tuple[np.ndarray, ...]:
    """Attention, MLP and their peaks; a module that is gone costs nothing."""
    generator = np.random.default_rng(seed)
    made = [
        generator.random((GROUPS + 1, HEADS)) if kind == 2 else generator.random(CHANNELS + 1) for kind in (2, 1, 2, 1)
    ]
    for table in made:
        table[0] = 0
    return tuple(made)


widths = st.builds(Widths, st.integers(0, GROUPS), st.integers(1, HEADS), st.integers(0, CHANNELS))


@given(seed=st.integers(0, 10**6), layers=st.lists(widths, min_size=1, max_size=5), vocabulary=st.integers(0, 99))
def test_a_total_is_the_sum_of_all_modules_and_the_largest_peak(seed, layers, vocabulary):
    attention, mlp, attention_peak, mlp_peak = tables(seed)
    costs = ModuleCosts(attention[None], mlp[None], attention_peak, mlp_peak, np.array([[[2.5, 0.125]]]))
    expected, peak = 2.5 + 0.125 * vocabulary, 0.0
    assert costs.base(vocabulary) == expected
    for groups, heads, channels in layers:
        expected += attention[groups][heads - 1] + mlp[channels]
        peak = max(peak, attention_peak[groups][heads - 1], mlp_peak[channels])
    assert costs.total(layers, vocabulary) == pytest.approx(expected + peak)


def test_an_additive_cost_has_no_peak():
    attention, mlp, *_ = tables(0)
    layer = Widths(2, 3, 5)
    costs = additive(attention[None], mlp[None], np.array([[[1.0, 2.0]]]))
    one, two = (costs.total([layer] * count, 10) for count in (1, 2))
    assert two - one == pytest.approx(attention[2, 2] + mlp[5])
    assert costs.total([Widths(0, 1, 0)], 10) == costs.base(10) == 21.0


@given(size=st.integers(1, 200), multiple=st.integers(1, 64))
def test_channels_are_multiples_below_the_size_and_the_size_itself(size, multiple):
    assert channel_options(size, multiple) == [k for k in range(1, size + 1) if k % multiple == 0 or k == size]
