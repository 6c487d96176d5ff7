"""Cholesky factors of second moments, however few the samples."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.errors import NumericalError
from edgeprune.pruning.linear import ROWS, cholesky, solved


def moments(seed: int, size: int, samples: int) -> torch.Tensor:
    rows = torch.randn(samples, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return rows.T @ rows


@given(seed=st.integers(0, 10**6), size=st.integers(1, 8), damping=st.sampled_from([0.0, 1e-6, 0.1]))
def test_the_factor_is_that_of_the_damped_matrix(seed, size, damping):
    matrix = moments(seed, size, 3 * size)
    before = matrix.clone()
    factor = cholesky(matrix, damping)
    expected = matrix + damping * matrix.diagonal().mean() * torch.eye(size, dtype=torch.float64)
    assert torch.equal(matrix, before)
    lower = factor.tril()
    assert torch.allclose(lower @ lower.T, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


@pytest.mark.parametrize("size", [7, ROWS + 5])
def test_another_matrix_is_subtracted_and_the_rows_are_ordered(size):
    matrix, part = moments(0, size, 3 * size), moments(1, size, size).float() / 100
    order = torch.randperm(size, generator=torch.Generator().manual_seed(2))
    difference = matrix - part
    assert torch.equal(cholesky(matrix, 0.1, part), cholesky(difference, 0.1))
    # The mean of the diagonal, which scales the damping, is summed in another order.
    for changes, whole in (((part, order), difference), ((None, order), matrix)):
        expected = cholesky(whole[order][:, order], 0.1)
        assert torch.allclose(cholesky(matrix, 0.1, *changes), expected, rtol=1e-12, atol=1e-12)


@given(seed=st.integers(0, 10**6), size=st.integers(1, 8), columns=st.integers(1, 4))
def test_the_factor_solves_the_equations(seed, size, columns):
    factor = cholesky(moments(seed, size, 3 * size), 0.1)
    expected = torch.randn(size, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    right = factor @ (factor.T @ expected)
    assert torch.allclose(solved(factor, right), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("matrix", [moments(0, 6, 2), torch.zeros(3, 3).double()], ids=["few samples", "zeros"])
def test_damping_grows_until_a_singular_matrix_has_a_factor(matrix):
    factor = cholesky(matrix, 0.0).tril()
    error = factor @ factor.T - matrix
    scale = float(matrix.diagonal().mean()) or 1.0
    assert (factor.diagonal() > 0).all()
    assert 0 < error.diagonal().min() <= error.diagonal().max() < 1e-9 * scale  # the least that suffices


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_moments_that_are_not_finite_are_refused_instead_of_damped_forever(value):
    matrix = moments(0, 4, 9)
    matrix[2, 2] = value
    with pytest.raises(NumericalError, match="not finite") as caught:
        cholesky(matrix, 1e-6)
    assert "leave out the sample" in caught.value.remedy
