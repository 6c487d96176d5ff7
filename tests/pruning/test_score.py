import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from edgeprune.errors import NumericalError
from edgeprune.pruning import score
from edgeprune.pruning.methods import METHODS
from edgeprune.pruning.moments import gram
from edgeprune.pruning.score import Projection

SCORES = [method.score for method in METHODS.values()]


def problem(
    seed: int, features: int = 8, out: int = 5, tokens: int = 40
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(tokens, features, generator=generator) @ torch.randn(features, features, generator=generator)
    return torch.randn(out, features, generator=generator), inputs, gram(inputs)


def projection(weight: torch.Tensor, inputs: torch.Tensor, seed: int = 0) -> Projection:
    return Projection(weight, gram(inputs), inputs[None], torch.Generator().manual_seed(seed))


def test_numerical_ranks_like_a_generic_minimiser_of_the_published_objective():
    """min_z 1/2 sum_i ||X W_i - X (z o W_i)||^2 + lambda/2 (<1, z> - r)^2, minimised by BFGS, whatever lambda and r."""
    weight, inputs, _ = problem(0)
    x, w = inputs.double().numpy(), weight.double().numpy()

    for penalty, target in ((1.0, 6.0), (1e4, 4.0)):

        def objective(z: np.ndarray) -> float:
            return 0.5 * np.square(x @ ((1 - z) * w).T).sum() + penalty / 2 * (z.sum() - target) ** 2  # noqa: B023

        optimum = minimize(objective, np.full(8, 0.5), method="BFGS", options={"gtol": 1e-9, "maxiter": 5000}).x
        ours = score.numerical(projection(weight, inputs), 1, 4)
        assert list(np.argsort(optimum)) == list(np.argsort(ours.numpy()))


def test_numerical_of_uncorrelated_inputs_is_the_diagonal_limit():
    weight, _, _ = problem(1)
    energies = torch.rand(8) + 0.1
    expected = -1 / (weight.double().square().sum(0) * energies)
    ours = score.numerical(projection(weight, torch.diag(energies.sqrt())), 1, 4)
    assert torch.allclose(ours, expected, rtol=1e-3)


def test_numerical_of_units_is_the_score_of_masks_that_are_constant_in_a_unit():
    weight, inputs, moments = problem(2)
    interaction = (weight.T @ weight).double() * moments
    expand = torch.kron(torch.eye(4, dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64))  # (8, 4)
    expected = -torch.linalg.solve(expand.T @ interaction @ expand, torch.ones(4, dtype=torch.float64))
    assert torch.allclose(score.numerical(projection(weight, inputs), 2, 2), expected, rtol=1e-4)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), tokens=st.integers(1, 12), dead=st.integers(0, 7))
def test_scores_are_finite_for_rank_deficient_moments_and_dead_channels(seed, tokens, dead):
    weight, inputs, _ = problem(seed, tokens=tokens)
    inputs[:, dead] = 0
    for rank in SCORES:
        for unit in (1, 2):
            assert torch.isfinite(rank(projection(weight, inputs), unit, 2)).all()


def test_a_dead_channel_is_the_first_to_go():
    weight, inputs, _ = problem(3)
    inputs[:, 5] = 0
    for rank in (score.numerical, score.numerical_box, score.obs, score.wanda, score.fluctuation, score.flap):
        assert int(rank(projection(weight, inputs), 1, 4).argmin()) == 5


def test_moments_that_are_not_finite_are_refused():
    weight, inputs, _ = problem(4)
    inputs[2, 2] = float("nan")
    for rank in (score.numerical, score.numerical_box, score.obs):
        with pytest.raises(NumericalError, match="not finite"):
            rank(projection(weight, inputs), 1, 4)


def test_random_depends_on_the_seed_only():
    weight, inputs, _ = problem(5)
    first, again, other = (score.random(projection(weight, inputs, s), 1, 4) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_wanda_is_the_norm_of_the_weights_times_the_norm_of_their_inputs():
    weight, inputs, _ = problem(6)
    single = weight.double().norm(dim=0) * inputs.double().norm(dim=0)
    assert torch.allclose(score.wanda(projection(weight, inputs), 1, 4), single, rtol=1e-5)
    pairs = single.square().view(4, 2).sum(dim=1).sqrt()
    assert torch.allclose(score.wanda(projection(weight, inputs), 2, 2), pairs, rtol=1e-5)


def test_the_fluctuation_is_standardised_whatever_the_inputs_mean():
    weight, inputs, _ = problem(7)
    metric = inputs.double().var(dim=0, correction=0) * weight.double().square().sum(dim=0)
    expected = (metric - metric.mean()) / metric.std()
    assert torch.allclose(score.fluctuation(projection(weight, inputs), 1, 4), expected, rtol=1e-4, atol=1e-6)
    assert torch.allclose(score.fluctuation(projection(weight, inputs + 3), 1, 4), expected, rtol=1e-3, atol=1e-4)
    heads = ((metric**2 - (metric**2).mean()) / (metric**2).std()).view(2, 4).mean(dim=1)
    assert torch.allclose(score.fluctuation(projection(weight, inputs), 4, 1), heads, rtol=1e-4, atol=1e-6)


def test_flap_s_own_estimate_of_a_single_sample_is_the_variance():
    """Its program would find none: every channel were as good as any other."""
    weight, inputs, _ = problem(7)
    given = projection(weight, inputs)
    assert len(given.inputs) == 1
    assert torch.equal(score.flap(given, 1, 4), score.fluctuation(given, 1, 4))
