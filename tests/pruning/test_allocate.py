import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.pruning.allocate import Sensitivities, Widths, best_within, uniform_options
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


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), budget=st.integers(1, 1200))
def test_the_choice_is_the_least_error_within_the_budget_by_brute_force(seed, budget):
    generator = np.random.default_rng(seed)
    attention = np.sort(generator.random((2, 2, 3)), axis=None).reshape(2, 2, 3)[:, ::-1, ::-1]
    mlp = -np.sort(-generator.random((2, 101)), axis=1)
    sensitivities = Sensitivities(attention, mlp)
    options = uniform_options(Widths(2, 3, 100), 25)

    def cost(widths: Widths) -> int:
        return 100 * widths.num_key_value_heads * widths.heads_per_group + 5 * widths.intermediate_size

    chosen = best_within(options, sensitivities.uniform_loss, lambda widths: cost(widths) <= budget)
    feasible = [widths for widths in options if cost(widths) <= budget]
    if not feasible:
        assert chosen is None
    else:
        errors = [attention[:, w[0] - 1, w[1] - 1].sum() + mlp[:, w[2]].sum() for w in feasible]
        assert np.isclose(sensitivities.uniform_loss(chosen), min(errors))
