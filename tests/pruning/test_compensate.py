import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.pruning.compensate import compensate, least_squares_update
from edgeprune.pruning.moments import Moments, gram, split_moments


def case(seed: int, tokens: int = 60, features: int = 10, out: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features, features, generator=generator, dtype=torch.float64)
    inputs = torch.randn(tokens, features, generator=generator, dtype=torch.float64) @ mixing
    return torch.randn(out, features, generator=generator, dtype=torch.float64), inputs


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), kept_count=st.integers(1, 9), damping=st.sampled_from([1e-6, 1e-2, 1.0]))
def test_the_update_solves_the_constrained_problem(seed, kept_count, damping):
    """Against the KKT system of min ||X (W' - W)^T||^2 + g ||W' - W||^2 subject to W'_P = 0.

    The update of the paper with damping on all of G: dW = -(G + gI)^-1 M (M^T (G + gI)^-1 M)^-1 M^T W.
    """
    weight, inputs = case(seed)
    moments = inputs.T @ inputs
    order = torch.randperm(10, generator=torch.Generator().manual_seed(seed))
    kept, removed = order[:kept_count].sort().values, order[kept_count:].sort().values
    damped = moments + damping * moments[kept][:, kept].diagonal().mean() * torch.eye(10)
    constraint = torch.eye(10, dtype=torch.float64)[removed]  # (removed, 10)
    system = torch.cat(
        [
            torch.cat([damped, constraint.T], dim=1),
            torch.cat([constraint, torch.zeros(len(removed), len(removed), dtype=torch.float64)], dim=1),
        ]
    )
    right = torch.cat([torch.zeros(10, len(weight), dtype=torch.float64), -weight.T[removed]])
    change = torch.linalg.solve(system, right)[:10].T
    ours = least_squares_update(weight, moments, kept, removed, damping)
    assert torch.allclose(ours, change[:, kept], rtol=1e-6, atol=1e-8)


def test_without_damping_it_is_the_least_squares_optimum():
    weight, inputs = case(7, tokens=500)
    kept, removed = torch.tensor([0, 2, 5, 6, 9]), torch.tensor([1, 3, 4, 7, 8])
    optimum = torch.linalg.lstsq(inputs[:, kept], inputs @ weight.T).solution.T
    ours = weight[:, kept] + least_squares_update(weight, inputs.T @ inputs, kept, removed, 1e-12)
    assert torch.allclose(ours, optimum, rtol=1e-6)


def test_nothing_pruned_changes_nothing():
    weight, inputs = case(1)
    result = compensate(weight.float(), split_moments(inputs.float()[None]), torch.arange(10))
    assert torch.equal(result.weight, weight.float())
    assert result.error_after == 0


def test_errors_are_those_of_the_held_out_samples():
    weight, inputs = case(2, tokens=200)
    fit, held_out = inputs[:150], inputs[150:]
    moments = Moments(fit.T @ fit, held_out.T @ held_out)
    kept, removed = torch.arange(0, 10, 2), torch.arange(1, 10, 2)
    result = compensate(weight.float(), moments, kept)
    energy = (held_out @ weight.T).square().sum()
    before = (held_out[:, removed] @ weight[:, removed].T).square().sum() / energy
    solved = weight[:, kept] + least_squares_update(weight, moments.fit, kept, removed, result.damping)
    after = (held_out @ weight.T - held_out[:, kept] @ solved.T).square().sum() / energy
    assert result.error_before == pytest.approx(float(before), rel=1e-5)
    assert result.error_after == pytest.approx(float(after), rel=1e-4)
    assert result.error_after < result.error_before


def test_it_falls_back_where_no_update_helps():
    """Held-out samples whose correlations are the opposite of the fitted ones."""
    fit = torch.tensor([[1.0, 1.0], [2.0, 2.0], [-1.0, -1.0]])
    moments = Moments(gram(fit), gram(fit * torch.tensor([1.0, -1.0])))
    result = compensate(torch.tensor([[1.0, 1.0]]), moments, torch.tensor([0]))
    assert result.damping is None
    assert torch.equal(result.weight, torch.tensor([[1.0]]))
    assert result.error_after == result.error_before


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), tokens=st.integers(2, 12), scale=st.sampled_from([1e-6, 1.0, 1e6]))
def test_tiny_rank_deficient_and_huge_moments_survive(seed, tokens, scale):
    weight, inputs = case(seed, tokens=tokens)
    inputs[:, 3] = 0
    result = compensate(weight.float(), split_moments((scale * inputs).float()[None]), torch.tensor([1, 3, 8]))
    assert torch.isfinite(result.weight).all()
    assert result.error_after <= result.error_before
