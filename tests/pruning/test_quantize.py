"""Rounding to few bits: against brute force on small cases, exact on its own grid, and never worse for odd inputs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.errors import InputError, NumericalError
from edgeprune.model.quantised import QuantisedWeight, storable
from edgeprune.precision import WEIGHT_FORMATS, WeightFormat
from edgeprune.pruning.grids import choose_grid
from edgeprune.pruning.quantize import DAMPING, gptq, gptq_squares, quantise, relative_error

SMALL = (WeightFormat("i8", 8), WeightFormat("i4", 4, 8), WeightFormat("a4", 4, 4, offset="zero"))


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


def on_a_grid(form: WeightFormat, seed: int, outputs: int = 4, inputs: int = 32) -> QuantisedWeight:
    """Random codes that use their whole range in every group, and scales of as many bits as the format's."""
    generator = torch.Generator().manual_seed(seed)
    groups = form.groups_of(inputs)
    codes = torch.randint(form.least, form.most + 1, (outputs, groups, inputs // groups), generator=generator)
    codes[..., 0], codes[..., 1] = form.most, form.least
    scales = storable(torch.rand(outputs, groups, generator=generator).add(1) * 2.0**-5, form.offset is not None)
    zeros = torch.randint(form.least, form.most + 1, (outputs, groups), generator=generator).to(torch.int8)
    return QuantisedWeight(form, codes.flatten(1).to(torch.int8), scales, zeros if form.offset else None)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), form=st.sampled_from(SMALL))
def test_a_weight_on_the_grid_stays_as_it_is(seed, form):
    whole = on_a_grid(form, seed)
    weight, moments = whole.dequantised(), case(seed, inputs=32)[1]
    grid = choose_grid(weight, moments.diagonal(), form)
    for rounded in (grid.nearest(weight), gptq(weight, moments, grid)):
        assert torch.equal(rounded.dequantised(), weight)
        assert torch.equal(rounded.codes, whole.codes)


def test_a_symmetric_grid_of_4_bits_is_found_whatever_its_largest_code():
    for most in range(1, 9):
        codes = torch.arange(-most, most + 1).clamp_max(7).repeat(11)[:32].float()
        weight = (codes * 0.0390625)[None].repeat(3, 1)
        grid = choose_grid(weight, torch.ones(32), WEIGHT_FORMATS["int4-32"])
        assert torch.equal(grid.nearest(weight).dequantised(), weight)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), form=st.sampled_from(SMALL))
def test_every_code_is_in_range_and_every_weight_near_its_own(seed, form):
    weight, moments = case(seed)
    grid = choose_grid(weight, torch.ones(16), form)
    rounded = grid.nearest(weight)
    assert int(rounded.codes.min()) >= form.least
    assert int(rounded.codes.max()) <= form.most
    scales = rounded.scales.repeat_interleave(16 // rounded.scales.shape[1], dim=1)
    is_inside = (rounded.codes > form.least) & (rounded.codes < form.most)
    assert ((rounded.dequantised() - weight).abs() <= 0.5001 * scales)[is_inside].all()


def test_the_grid_weighs_errors_by_the_moments():
    weight, moments = case(4, outputs=64, inputs=64)
    importance = moments.diagonal().float()
    alike, weighed = (choose_grid(weight, by, SMALL[1]).nearest(weight) for by in (torch.ones(64), importance))
    errors = [((rounded.dequantised() - weight).square() * importance).sum() for rounded in (weighed, alike)]
    assert errors[0] < 0.9 * errors[1]


def test_gptq_loses_less_than_rounding_where_inputs_are_correlated():
    weight, moments = case(0, outputs=64, inputs=64, tokens=1000)
    for form in SMALL:
        result = quantise(weight, moments, case(0, 64, 64, 1000)[1] / 4, form)
        nearest = choose_grid(weight, moments.diagonal(), form).nearest(weight).dequantised()
        assert result.rounding == "gptq"
        assert result.error < 0.7 * relative_error(weight, nearest, moments)
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


def test_groups_that_do_not_divide_the_inputs_are_refused():
    with pytest.raises(InputError, match="groups of 64, which do not divide 100 inputs") as error:
        choose_grid(torch.ones(2, 100), torch.ones(100), WEIGHT_FORMATS["int4-64"])
    assert "multiples of 64" in error.value.remedy
