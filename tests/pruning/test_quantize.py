"""Rounding to few bits: against brute force on small cases, exact on its own grid, and never worse for odd inputs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.errors import NumericalError
from edgeprune.precision import ScaleBlock, WeightFormat
from edgeprune.pruning.grids import choose_grid
from edgeprune.pruning.quantize import DAMPING, gptq, gptq_squares, quantise, relative_error

SMALL = (
    WeightFormat("i8", 8),
    WeightFormat("i4", 4, 8),
    WeightFormat("a4", 4, 4, "zero"),
    WeightFormat("k3", 3, 4, block=ScaleBlock(16, 6, signed=True)),
    WeightFormat("k4", 4, 8, "minimum", unsigned=True, block=ScaleBlock(16, 6, signed=False)),
)


def case(seed: int, outputs: int = 5, inputs: int = 16, tokens: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight (outputs, inputs) and the moments of correlated inputs of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=generator) * torch.randn(inputs, generator=generator).exp()
    x = (torch.randn(tokens, inputs, generator=generator) @ mixing).double()
    return torch.randn(outputs, inputs, generator=generator), x.T @ x


def brute_force(weight: torch.Tensor, moments: torch.Tensor, form: WeightFormat) -> torch.Tensor:
    """GPTQ as its paper derives it: after every column the inverse of the moments that are left is computed anew."""
    grid = choose_grid(weight, moments.diagonal(), form)
    moments = moments.clone()
    moments.diagonal().add_(DAMPING * moments.diagonal().mean())
    left = torch.argsort(moments.diagonal(), descending=True, stable=True).tolist()
    group = weight.shape[1] // grid.scales.shape[1]
    weight, codes = weight.double(), torch.zeros_like(weight)
    while left:
        column, inverse = left[0], torch.linalg.inv(moments[left][:, left])
        scale, zero, minimum = (
            0.0 if part is None else part[:, column // group].double()
            for part in (grid.scales, grid.zeros, grid.minima)
        )
        code = ((weight[:, column] - minimum) / scale).round().add(zero).clamp(form.least, form.most)
        codes[:, column] = code
        error = (weight[:, column] - (code - zero) * scale - minimum) / inverse[0, 0]
        weight = weight.clone()
        weight[:, left] -= error[:, None] * inverse[0]
        left = left[1:]
    return codes


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), form=st.sampled_from(SMALL))
def test_it_is_the_papers_gptq(seed, form):
    weight, moments = case(seed)
    rounded = gptq(weight, moments, choose_grid(weight, moments.diagonal(), form))
    off = (rounded.codes.float() - brute_force(weight, moments, form)).abs()
    # Half way between two codes, the last bit of another order of sums decides: very rarely, and by one.
    assert off.max() <= 1
    assert (off > 0).sum() <= 1


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), form=st.sampled_from(SMALL))
def test_a_weight_on_the_grid_stays_as_it_is(seed, form):
    weight, moments = case(seed)
    grid = choose_grid(weight, moments.diagonal(), form)
    on_grid = grid.nearest(weight)
    assert torch.equal(gptq(on_grid.dequantised(), moments, grid).dequantised(), on_grid.dequantised())


def test_gptq_loses_less_than_rounding_where_inputs_are_correlated():
    weight, moments = case(0, outputs=64, inputs=64, tokens=1000)
    for form in SMALL:
        result = quantise(weight, moments, case(0, 64, 64, 1000)[1] / 4, form)
        nearest = choose_grid(weight, moments.diagonal(), form, "starts").nearest(weight).dequantised()
        assert result.rounding == "gptq"
        assert result.error < (0.8 if form.offset is None and form.block is None else 0.95) * relative_error(
            weight, nearest, moments
        )
        assert result.error == pytest.approx(relative_error(weight, result.weight.dequantised(), moments))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_the_squares_of_gptq_are_those_of_its_factor(seed):
    _, moments = case(seed)
    inputs = torch.randn(40, 16, generator=torch.Generator().manual_seed(seed))
    order = torch.argsort(moments.diagonal(), descending=True, stable=True)
    damped = moments + DAMPING * moments.diagonal().mean() * torch.eye(16, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped[order][:, order]), upper=True)
    outputs = inputs[:, order].double() @ (upper / upper.diagonal()[:, None]).T
    expected = torch.empty(16, dtype=torch.float64).index_copy_(0, order, outputs.square().sum(0))
    assert torch.allclose(gptq_squares(moments, inputs), expected, rtol=1e-3)


def test_held_out_samples_decide():
    """Where the held-out inputs are nothing like the others, what GPTQ makes up for is lost."""
    weight, moments = case(1, outputs=32, inputs=32)
    held_out = torch.diag(torch.linspace(1e4, 1e6, 32).double())
    result = quantise(weight, moments + held_out, held_out, SMALL[1])
    assert result.rounding == "nearest"


@pytest.mark.parametrize("form", SMALL)
def test_odd_moments_are_survived(form):
    weight, moments = case(2, inputs=32, tokens=5)  # fewer tokens than inputs
    dead = moments.clone()
    dead[3:9], dead[:, 3:9] = 0.0, 0.0
    for odd in (moments, dead, torch.zeros_like(moments)):
        result = quantise(weight, odd, odd / 4, form)
        assert torch.isfinite(result.weight.dequantised()).all()
        assert result.error < 0.1 or math.isnan(result.error)
    zero = quantise(torch.zeros_like(weight), moments, None, form)
    assert not zero.weight.dequantised().any()
    assert zero.rounding == "nearest"
    assert math.isnan(zero.error)


def test_moments_that_are_not_finite_are_named():
    weight, moments = case(3)
    with pytest.raises(NumericalError, match="not finite"):
        quantise(weight, moments * math.nan, moments, SMALL[0])
