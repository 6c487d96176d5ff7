import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from edgeprune.errors import NumericalError
from edgeprune.pruning import score
from edgeprune.pruning.moments import gram


def problem(
    seed: int, features: int = 8, out: int = 5, tokens: int = 40
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(tokens, features, generator=generator) @ torch.randn(features, features, generator=generator)
    return torch.randn(out, features, generator=generator), inputs, gram(inputs)


def test_numerical_ranks_like_a_generic_minimiser_of_the_published_objective():
    """min_z 1/2 sum_i ||X W_i - X (z o W_i)||^2 + lambda/2 (<1, z> - r)^2, minimised by BFGS, whatever lambda and r."""
    weight, inputs, moments = problem(0)
    x, w = inputs.double().numpy(), weight.double().numpy()

    for penalty, target in ((1.0, 6.0), (1e4, 4.0)):

        def objective(z: np.ndarray) -> float:
            return 0.5 * np.square(x @ ((1 - z) * w).T).sum() + penalty / 2 * (z.sum() - target) ** 2  # noqa: B023

        optimum = minimize(objective, np.full(8, 0.5), method="BFGS", options={"gtol": 1e-9, "maxiter": 5000}).x
        ours = score.numerical(weight, moments, 1, torch.Generator())
        assert list(np.argsort(optimum)) == list(np.argsort(ours.numpy()))


def test_numerical_of_uncorrelated_inputs_is_the_diagonal_limit():
    weight, _, _ = problem(1)
    energies = torch.rand(8, dtype=torch.float64) + 0.1
    expected = -1 / (weight.double().square().sum(0) * energies)
    ours = score.numerical(weight, torch.diag(energies), 1, torch.Generator())
    assert torch.allclose(ours, expected, rtol=1e-3)


def test_numerical_of_units_is_the_score_of_masks_that_are_constant_in_a_unit():
    weight, _, moments = problem(2)
    interaction = (weight.T @ weight).double() * moments
    expand = torch.kron(torch.eye(4, dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64))  # (8, 4)
    expected = -torch.linalg.solve(expand.T @ interaction @ expand, torch.ones(4, dtype=torch.float64))
    assert torch.allclose(score.numerical(weight, moments, 2, torch.Generator()), expected, rtol=1e-4)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), tokens=st.integers(1, 12), dead=st.integers(0, 7))
def test_scores_are_finite_for_rank_deficient_moments_and_dead_channels(seed, tokens, dead):
    weight, inputs, _ = problem(seed, tokens=tokens)
    inputs[:, dead] = 0
    for rank in (score.numerical, score.magnitude, score.random):
        assert torch.isfinite(rank(weight, gram(inputs), 1, torch.Generator())).all()


def test_a_dead_channel_is_the_first_to_go():
    weight, inputs, _ = problem(3)
    inputs[:, 5] = 0
    assert int(score.numerical(weight, gram(inputs), 1, torch.Generator()).argmin()) == 5


def test_moments_that_are_not_finite_are_refused():
    weight, _, moments = problem(4)
    moments[2, 2] = float("nan")
    with pytest.raises(NumericalError, match="not finite"):
        score.numerical(weight, moments, 1, torch.Generator())


def test_random_depends_on_the_seed_only():
    weight, _, moments = problem(5)
    first, again, other = (score.random(weight, moments, 1, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
