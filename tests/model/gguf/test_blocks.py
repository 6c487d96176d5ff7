"""Blocks stand for exactly the numbers of the codes, as the gguf package reads them."""

from __future__ import annotations

import pytest
import torch
from gguf import GGML_QUANT_SIZES
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.errors import NumericalError
from edgeprune.model.gguf.blocks import LAYOUTS, block_type, packed, unpacked
from edgeprune.model.quantised import SMALLEST_SCALE, QuantisedWeight, storable
from edgeprune.precision import WEIGHT_FORMATS, WeightFormat
from edgeprune.pruning.grids import choose_grid
from tests.support.ggml_blocks import GGML_FORMATS, assert_equal, drawn_blocks
from tests.support.quantised import PACKED_FORMATS

BYTES = {"int8": 34, "w8a8": 34, "int4-32": 18, "int4-64": 18, "int4-128": 18, "int4-32-asymmetric": 20}  # of a block


def random_codes(form: WeightFormat, seed: int, outputs: int = 6, inputs: int = 256) -> QuantisedWeight:
    """Codes and zeros of the whole range, scales over the range of fp16."""
    generator = torch.Generator().manual_seed(seed)

    def whole(*shape: int) -> torch.Tensor:
        return torch.randint(form.least, form.most + 1, shape, generator=generator, dtype=torch.int8)

    groups = form.groups_of(inputs)
    scales = 2 ** (torch.rand(outputs, groups, generator=generator) * 34 - 24)  # up to 1024
    scales[0] = SMALLEST_SCALE
    zeros = whole(outputs, groups) if form.offset else None
    return QuantisedWeight(form, whole(outputs, inputs), storable(scales, form.offset is not None), zeros)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(list(PACKED_FORMATS.values())), st.integers(0, 10**6))
def test_blocks_stand_for_the_numbers_of_the_codes(form, seed):
    weight = random_codes(form, seed)
    blocks = packed("w", weight)
    assert blocks.shape == (6, 8 * BYTES[form.name])
    values = dequantize(blocks.numpy(), block_type(form))
    assert torch.equal(torch.from_numpy(values), weight.dequantised())


def check_blocks(weight: QuantisedWeight) -> None:
    """The gguf package reads the same numbers, signs of zeros included, and the blocks read back as the weight."""
    form = weight.form
    blocks = packed("w", weight)
    inputs, size = GGML_QUANT_SIZES[block_type(form)]
    assert blocks.shape == (len(weight.codes), weight.shape[1] // inputs * size)
    assert 8 * size * weight.codes.numel() == 8 * inputs * form.stored_bytes(*weight.shape)
    values = torch.from_numpy(dequantize(blocks.numpy(), block_type(form)))
    assert torch.equal(values.view(torch.int32), weight.dequantised().view(torch.int32))
    again = unpacked(form, blocks)
    assert_equal(again, weight)
    assert torch.equal(packed("w", again), blocks)


def test_every_format_of_ggml_has_a_layout():
    assert LAYOUTS.keys() == GGML_FORMATS.keys()


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(GGML_FORMATS.values())), st.integers(0, 10**6))
def test_blocks_of_ggml_hold_drawn_codes_bit_for_bit(form, seed):
    check_blocks(drawn_blocks(form, seed))


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(list(GGML_FORMATS.values())), st.integers(0, 10**6), st.floats(-6, 3))
def test_blocks_of_ggml_hold_what_a_grid_rounds_to_bit_for_bit(form, seed, power):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, 512, generator=generator) * 10**power
    weight[0], weight[1, :256], weight[2] = 0.0, 0.0, weight[2].abs()
    check_blocks(choose_grid(weight, torch.rand(512, generator=generator), form).nearest(weight))


@pytest.mark.parametrize("form", WEIGHT_FORMATS.values(), ids=WEIGHT_FORMATS)
def test_zero_bytes_are_zeros(form):
    if form.storage == "offset":
        return
    kind = block_type(form)
    blocks = torch.zeros(3, 2 * GGML_QUANT_SIZES[kind][1], dtype=torch.uint8)
    assert not dequantize(blocks.numpy(), kind).any()


@pytest.mark.parametrize(("form", "scale"), [("int8", 1e6), ("int8", 1 / 3), ("int4-32-asymmetric", 2.0**14)])
def test_a_scale_that_fp16_does_not_hold_is_named(form, scale):
    weight = random_codes(WEIGHT_FORMATS[form], 0)
    if weight.zeros is not None:
        weight.zeros.fill_(7)
    with pytest.raises(NumericalError, match=r"scales of layers.0.mlp.up"):
        packed("layers.0.mlp.up", QuantisedWeight(weight.form, weight.codes, weight.scales.fill_(scale), weight.zeros))
