"""Grids of floats of 8 and 4 bits: relative steps, and scales of e4m3 under one unit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.model.levels import nearest, nearest_e4m3, values_of
from edgeprune.model.quantised import QuantisedWeight, scale_unit_for
from edgeprune.precision import WEIGHT_FORMATS
from edgeprune.pruning.grids import choose_grid
from edgeprune.pruning.quantize import ROWS, gptq, quantise, relative_error
from tests.support.quantised import FLOAT_FORMATS, random_codes

FP8, NVFP4 = WEIGHT_FORMATS["fp8"], WEIGHT_FORMATS["nvfp4"]
forms = st.sampled_from(list(FLOAT_FORMATS.values()))


def moments_of(seed: int, inputs: int = 64, tokens: int = 400) -> torch.Tensor:
    """Of correlated inputs of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=generator) * torch.randn(inputs, generator=generator).exp()
    x = (torch.randn(tokens, inputs, generator=generator) @ mixing).double()
    return x.T @ x


def weight_of(seed: int, outputs: int = 8, inputs: int = 64) -> torch.Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed)) * 0.02


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), form=forms)
def test_a_weight_on_the_grid_stays_as_it_is(seed, form):
    whole = random_codes(form, 4, 64, seed)
    groups = whole.codes.unflatten(1, (whole.scales.shape[1], -1))  # a view
    groups[..., 0] = 126 if form is FP8 else 7  # the largest level
    weight, moments = whole.dequantised(), moments_of(seed)
    grid = choose_grid(weight, moments.diagonal(), form)
    for rounded in (grid.nearest(weight), gptq(weight, moments, grid)):
        assert torch.equal(rounded.dequantised(), weight)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), form=forms)
def test_every_weight_gets_the_nearest_level_of_its_scale(seed, form):
    """Among all levels, by brute force."""
    weight = weight_of(seed)
    rounded = choose_grid(weight, torch.ones(64), form).nearest(weight)
    levels = values_of(torch.arange(2**form.bits).to(torch.uint8).view(torch.int8), form.levels)
    levels = levels[levels.isfinite()]
    scales = rounded.scales.repeat_interleave(64 // rounded.scales.shape[1], dim=1)[..., None]
    least = (levels * scales - weight[..., None]).abs().amin(dim=2)
    assert torch.equal((rounded.dequantised() - weight).abs(), least)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_no_scale_of_4_bits_loses_more_than_that_of_the_largest_weight(seed):
    """As NVIDIA's tools choose it: the largest weight of a group becomes the largest level."""
    weight, importance = weight_of(seed), moments_of(seed).diagonal().float()
    grid = choose_grid(weight, importance, NVFP4)
    groups = weight.unflatten(1, (grid.scales.shape[1], -1))
    scales = nearest_e4m3(groups.abs().amax(dim=2, keepdim=True) / (6 * grid.scale_unit)) * grid.scale_unit
    theirs = (nearest(groups / scales, "e2m1", -6, 6) * scales).flatten(1)
    errors = [
        ((values - weight).square() * importance).sum(dim=1) for values in (grid.nearest(weight).dequantised(), theirs)
    ]
    assert (errors[0] <= errors[1]).all()


@pytest.mark.parametrize("form", FLOAT_FORMATS.values(), ids=FLOAT_FORMATS)
def test_gptq_loses_less_than_rounding_where_inputs_are_correlated(form):
    weight, moments = weight_of(0, 64), moments_of(0, tokens=1000)
    result = quantise(weight, moments, moments_of(0, tokens=1000) / 4, form)
    plain = choose_grid(weight, moments.diagonal(), form).nearest(weight).dequantised()
    assert result.rounding == "gptq"
    assert result.error < 0.7 * relative_error(weight, plain, moments)


def test_scales_of_4_bits_are_numbers_of_e4m3_of_one_unit_for_all_rows():
    """Of a matrix that is rounded in several parts, the largest weight in the last; no group is of scale 0."""
    weight = weight_of(0, ROWS + 8, 32)
    weight[-1, 0], weight[0] = 5.0, 0.0
    result = quantise(weight, torch.eye(32, dtype=torch.float64), None, NVFP4).weight
    assert isinstance(result, QuantisedWeight)
    assert float(result.scale_unit) == float(scale_unit_for(torch.tensor(5.0), NVFP4)) == 2.0**-9
    numbers = result.scales / result.scale_unit
    assert torch.equal(nearest_e4m3(numbers.clone()), numbers)
    assert float(numbers.min()) > 0
    assert float((result.dequantised() - weight).abs().max()) <= 5.0 / 6
    # All are numbers of fp16 and of bf16, whatever a graph or a checkpoint is in.
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(result.dequantised().to(dtype).float(), result.dequantised())
