"""The search for grids: beside ggml's own, beside brute force on tiny blocks, and exact on a weight's own grid."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.errors import InputError
from edgeprune.model.quantised import QuantisedWeight, half_of, storable
from edgeprune.precision import WEIGHT_FORMATS, WeightFormat
from edgeprune.pruning.grids import choose_grid
from tools.ggml_files import rounded_by_ggml

SMALL = (WeightFormat("i8", 8), WeightFormat("i4", 4, 8), WeightFormat("a4", 4, 4, "zero"))
GGML = {name: form for name, form in WEIGHT_FORMATS.items() if form.storage == "gguf"}
FORMATS = [*SMALL, *(form for form in WEIGHT_FORMATS.values() if form.levels == "whole")]


def loss(weight: torch.Tensor, rounded: torch.Tensor, importance: torch.Tensor) -> float:
    return float((rounded - weight).double().square().mul_(importance).sum())


def drawn(kind: str, seed: int, rows: int, columns: int) -> torch.Tensor:
    """Weights (rows, columns) of some distribution."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    if kind == "heavy tails":  # Student's t of three degrees of freedom
        weight /= torch.randn(3, rows, columns, generator=generator).square().mean(dim=0).sqrt()
    elif kind == "unequal rows and columns":
        weight *= torch.randn(rows, 1, generator=generator).exp()
        weight *= torch.randn(1, columns, generator=generator).mul(0.5).exp()
    elif kind == "off zero":
        weight += 0.7
    return weight * 0.02


KINDS = ("normal", "heavy tails", "unequal rows and columns", "off zero")


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(GGML.values())), st.sampled_from(KINDS), st.integers(0, 10**6), st.floats(0, 2))
def test_it_never_loses_more_than_ggml(form, kind, seed, spread):
    """Over a matrix; by the errors weighed with the mean squares of the inputs, which ggml is given too."""
    weight = drawn(kind, seed, 16, 512)
    importance = (spread * torch.randn(512, generator=torch.Generator().manual_seed(seed))).exp()
    rounded = choose_grid(weight, importance, form).nearest(weight).dequantised()
    by_ggml = loss(weight, rounded_by_ggml(weight, importance, form.name.upper()), importance)
    assert loss(weight, rounded, importance) <= by_ggml


def on_a_grid(form: WeightFormat, seed: int, outputs: int = 4, inputs: int = 512) -> QuantisedWeight:
    """Random codes that use their whole range in every group, and scales of as many bits as the format's."""
    generator = torch.Generator().manual_seed(seed)
    groups = form.groups_of(inputs)

    def whole(least: int, most: int, *shape: int) -> torch.Tensor:
        return torch.randint(least, most + 1, shape, generator=generator)

    codes = whole(form.least, form.most, outputs, groups, inputs // groups)
    codes[..., 0], codes[..., 1] = form.most, form.least
    codes, scales = codes.flatten(1).to(torch.int8), torch.rand(outputs, groups, generator=generator).add(1) * 2.0**-5
    if form.block is not None:
        blocks = inputs // form.block.inputs
        numbers = whole(form.block.most // 2, form.block.most, outputs, blocks, groups // blocks)
        units = half_of(scales[:, :blocks] / 64)
        # The largest scale of a block has the most units, or the least where these have a sign.
        numbers[..., 0] = form.block.least or form.block.most
        scales = (numbers * units[..., None]).flatten(1)
        if form.offset is None:
            return QuantisedWeight(form, codes, scales, units=units)
        numbers[..., 1] = form.block.most
        minima = -(numbers * units[..., None]).flatten(1)
        return QuantisedWeight(form, codes, scales, minima=minima, units=units, minimum_units=units)
    stored = half_of if form.storage == "gguf" else lambda scales: storable(scales, form.offset is not None)
    if form.offset == "minimum":
        return QuantisedWeight(form, codes, stored(scales), minima=-stored(scales.flip(0) * form.most))
    zeros = whole(form.least, form.most, outputs, groups).to(torch.int8) if form.offset else None
    return QuantisedWeight(form, codes, stored(scales), zeros)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(FORMATS), st.integers(0, 10**6), st.floats(0, 2))
def test_a_weight_on_the_grid_stays_as_it_is(form, seed, spread):
    weight = on_a_grid(form, seed).dequantised()
    importance = (spread * torch.randn(512, generator=torch.Generator().manual_seed(seed))).exp()
    assert torch.equal(choose_grid(weight, importance, form).nearest(weight).dequantised(), weight)


@pytest.mark.parametrize("name", ["int4-32", "q4_0"])
def test_a_symmetric_grid_of_4_bits_is_found_whatever_its_largest_code(name):
    form = WEIGHT_FORMATS[name]
    for most in range(1, 1 - form.least):
        codes = torch.randint(-most, min(most, form.most) + 1, (3, 256), generator=torch.Generator().manual_seed(most))
        codes[:, ::8] = -most
        weight = codes * 0.0390625
        grid = choose_grid(weight, torch.ones(256), form)
        assert torch.equal(grid.nearest(weight).dequantised(), weight), most


def brute_force(weight: torch.Tensor, importance: torch.Tensor, form: WeightFormat) -> torch.Tensor:
    """The least error (out, groups) fp64 of all codes with all zeros, each with the least squares of scale and minimum.

    The scales are any numbers, of one sign unless the format has both.
    """
    values = weight.double().unflatten(1, (-1, form.group))
    weights = importance.double().unflatten(0, (-1, form.group))
    total, best = weights.sum(-1), torch.full(values.shape[:2], torch.inf, dtype=torch.float64)
    zeros = range(form.least, form.most + 1) if form.offset == "zero" else (0,)
    for codes in itertools.product(range(form.least, form.most + 1), repeat=form.group):
        for zero in zeros:
            levels = torch.tensor(codes, dtype=torch.float64) - zero
            of_levels, of_squares = (weights * levels).sum(-1), (weights * levels**2).sum(-1)
            of_values, of_products = (values * weights).sum(-1), (values * weights * levels).sum(-1)
            if form.offset == "minimum":
                common = total * of_squares - of_levels**2
                scales = torch.where(common > 1e-9, (total * of_products - of_levels * of_values) / common, 0.0)
                minima = (of_values - scales * of_levels) / total
            else:
                scales = torch.where(of_squares > 0, of_products / of_squares, 0.0)
                minima = torch.zeros(())
            scales = scales if form.signed_scales else scales.clamp_min(0)
            off = scales[..., None] * levels + minima[..., None] - values
            error = (off**2 * weights).sum(-1)
            best = torch.minimum(best, error)
    return best


TINY = [
    WeightFormat("i2", 2, 6),
    WeightFormat("i3", 3, 4),
    WeightFormat("s3", 3, 4, signed_scales=True, storage="gguf"),
    WeightFormat("z2", 2, 4, "zero"),
    WeightFormat("z3", 3, 3, "zero"),
    WeightFormat("m2", 2, 4, "minimum", unsigned=True, storage="gguf"),
    WeightFormat("m3", 3, 3, "minimum", unsigned=True, storage="gguf"),
]


@pytest.mark.slow
@pytest.mark.parametrize("form", TINY, ids=[form.name for form in TINY])
@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.sampled_from(KINDS), st.integers(0, 10**6), st.floats(0, 2))
def test_it_is_the_best_of_all_codes_on_tiny_blocks(form, kind, seed, spread):
    """But for what storing the scales in fp16 adds."""
    weight = drawn(kind, seed, 8, form.group * 16)
    importance = (spread * torch.randn(form.group * 16, generator=torch.Generator().manual_seed(seed))).exp()
    rounded = choose_grid(weight, importance, form).nearest(weight).dequantised()
    best, whole = float(brute_force(weight, importance, form).sum()), loss(weight, torch.zeros(()), importance)
    assert loss(weight, rounded, importance) <= 1.002 * best + 2e-5 * whole


SCANNED = {WeightFormat("i3", 3, 8): 1.001, WeightFormat("i4", 4, 16): 1.001, WeightFormat("a4", 4, 16, "zero"): 1.005}


@pytest.mark.parametrize(("form", "share"), SCANNED.items(), ids=[form.name for form in SCANNED])
@pytest.mark.parametrize("kind", KINDS[:2])
def test_it_is_the_best_of_a_fine_scan(form, share, kind):
    """Two thousand scales, and every zero."""
    weight, importance = drawn(kind, 0, 40, 32), torch.randn(32, generator=torch.Generator().manual_seed(0)).exp()
    grouped, weights = weight.unflatten(1, (-1, form.group)), importance.unflatten(0, (-1, form.group))
    scales = grouped.abs().amax(2, keepdim=True) * torch.linspace(0.4, 2.2, 2000) / form.most / (1 + bool(form.offset))
    best = torch.full(scales.shape, torch.inf)  # (out, groups, scales)
    for zero in range(form.least, form.most + 1) if form.offset else (0,):
        codes = (grouped[..., None] / scales[:, :, None]).round_().add_(zero).clamp_(form.least, form.most)
        off = codes.sub_(zero).mul_(scales[:, :, None]).sub_(grouped[..., None])
        best = torch.minimum(best, off.square_().mul_(weights[..., None]).sum(2))
    rounded = choose_grid(weight, importance, form).nearest(weight).dequantised()
    assert loss(weight, rounded, importance) <= share * float(best.amin(2).sum())


@pytest.mark.parametrize("name", ["q3_k", "q4_k", "q5_k", "q6_k"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_of_units_are_nearly_the_best_there_are(name, kind):
    """Of every scale with every minimum that the units of the blocks allow."""
    form = WEIGHT_FORMATS[name]
    weight, importance = drawn(kind, 0, 2, 512), torch.randn(512, generator=torch.Generator().manual_seed(0)).exp()
    grid = choose_grid(weight, importance, form)
    groups = grid.scales.shape[1]
    grouped, weights = weight.unflatten(1, (groups, -1)), importance.unflatten(0, (groups, -1))
    units, minimum_units = (
        None if part is None else part.repeat_interleave(groups // 2, dim=1)[..., None]
        for part in (grid.units, grid.minimum_units)
    )
    least = torch.full(grid.scales.shape, torch.inf)
    numbers = itertools.product(
        range(form.block.least, form.block.most + 1), (0,) if form.offset is None else range(form.block.most + 1)
    )
    for number, minimum in numbers:
        if number:
            start = 0.0 if minimum_units is None else -minimum * minimum_units
            codes = ((grouped - start) / (number * units)).round_().clamp_(form.least, form.most)
            off = codes.mul_(number * units).add_(start).sub_(grouped)
            least = torch.minimum(least, off.square_().mul_(weights).sum(2))
    assert loss(weight, grid.nearest(weight).dequantised(), importance) <= 1.03 * float(least.sum())


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(FORMATS), st.sampled_from(KINDS), st.integers(0, 10**6))
def test_parts_are_what_the_format_stores(form, kind, seed):
    """Codes in their range, scales and minima of so many bits, or whole numbers of units that fp16 holds."""
    weight = drawn(kind, seed, 3, 512)
    weight[0, 32:300] = 0.0
    rounded = choose_grid(weight, torch.ones(512), form).nearest(weight)
    assert int(rounded.codes.min()) >= form.least
    assert int(rounded.codes.max()) <= form.most
    assert torch.isfinite(rounded.dequantised()).all()
    assert not rounded.dequantised()[0, 64:256].any()
    if form.block is None:
        stored = half_of if form.storage == "gguf" else lambda part: storable(part.abs(), form.offset == "zero")
        for part in (rounded.scales, rounded.minima):
            assert part is None or torch.equal(stored(part).abs(), part.abs())
        return
    for part, units, least in (
        (rounded.scales, rounded.units, form.block.least),
        (rounded.minima, rounded.minimum_units, 0),
    ):
        if part is not None:
            numbers = part.abs().unflatten(1, (2, -1)) / units.abs()[..., None]
            assert torch.equal(half_of(units), units)
            assert torch.allclose(numbers, numbers.round(), rtol=0, atol=1e-4)
            assert float(numbers.max()) <= max(-least, form.block.most)


def test_errors_are_weighed_by_the_importance():
    weight = drawn("normal", 4, 64, 64)
    importance = torch.randn(64, generator=torch.Generator().manual_seed(0)).mul(2).exp()
    alike, weighed = (choose_grid(weight, by, SMALL[1]).nearest(weight) for by in (torch.ones(64), importance))
    errors = [loss(weight, rounded.dequantised(), importance) for rounded in (weighed, alike)]
    assert errors[0] < 0.9 * errors[1]


def test_groups_that_do_not_divide_the_inputs_are_refused():
    with pytest.raises(InputError, match="groups of 64, which do not divide 100 inputs") as error:
        choose_grid(torch.ones(2, 100), torch.ones(100), WEIGHT_FORMATS["int4-64"])
    assert "multiples of 64" in error.value.remedy
