import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from edgeprune.pruning.relaxation import RIDGE, box_constrained, interaction, unconstrained


def matrix(seed: int, units: int = 12, tokens: int = 40) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(tokens, units, generator=generator) @ torch.randn(units, units, generator=generator)
    weight = torch.randn(5, units, generator=generator)
    return interaction(weight, inputs.double().T @ inputs.double(), 1)


def scaled(a: torch.Tensor, penalty: float) -> tuple[np.ndarray, float]:
    """The problem as the solver states it: mean diagonal 1, a ridge, and the penalty's scale-free form."""
    h = a / a.diagonal().mean()
    h.diagonal().add_(RIDGE)
    return h.numpy(), penalty / float(unconstrained(h).sum())


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    tokens=st.integers(2, 40),
    total=st.floats(0, 12),
    penalty=st.sampled_from([0.1, 1.0, 100.0, 1e4]),
)
def test_the_optimum_meets_the_kkt_conditions(seed, tokens, total, penalty):
    a = matrix(seed, tokens=tokens)
    z, gradient = box_constrained(a, total, penalty)
    h, weight = scaled(a, penalty)
    own = torch.from_numpy(h) @ (z - 1) + weight * (z.sum() - total)
    assert (own - gradient).abs().max() <= 1e-8
    assert ((z >= 0) & (z <= 1)).all()
    inside = (z > 1e-8) & (z < 1 - 1e-8)
    assert (gradient[inside].abs() <= 1e-8).all()
    assert (gradient[z <= 1e-8] >= -1e-8).all()
    assert (gradient[z >= 1 - 1e-8] <= 1e-8).all()


def test_the_optimum_is_that_of_a_generic_bounded_minimiser():
    a = matrix(3)
    z, _ = box_constrained(a, 5.0, 100.0)
    h, weight = scaled(a, 100.0)

    def objective(x: np.ndarray) -> float:
        return 0.5 * (x - 1) @ h @ (x - 1) + weight / 2 * (x.sum() - 5.0) ** 2

    def gradient(x: np.ndarray) -> np.ndarray:
        return h @ (x - 1) + weight * (x.sum() - 5.0)

    found = minimize(
        objective,
        np.full(12, 0.5),
        jac=gradient,
        method="L-BFGS-B",
        bounds=[(0, 1)] * 12,
        options={"ftol": 1e-15, "gtol": 1e-10, "maxiter": 10000},
    )
    assert objective(z.numpy()) <= found.fun + 1e-9
    assert np.allclose(z.numpy(), found.x, atol=1e-4)


def test_inside_the_box_it_is_the_closed_form():
    """With uncorrelated units of about equal energy the unconstrained optimum violates no bound."""
    a = torch.diag(torch.linspace(1.0, 1.5, 10, dtype=torch.float64))
    z, _ = box_constrained(a, 6.0, 100.0)
    u = unconstrained(a)
    expected = 1 - u * ((10 - 6) * 100 / (float(u.sum()) * 101))
    assert torch.allclose(z, expected, atol=1e-5)


@pytest.mark.parametrize("total", [0.0, 12.0])
def test_all_or_nothing_is_a_solution_too(total):
    z, _ = box_constrained(matrix(5), total, 1e6)
    assert float(z.sum()) == pytest.approx(total, abs=1e-2)
