"""Blocks stand for exactly the numbers of the codes, as the gguf package reads them."""

from __future__ import annotations

import pytest
import torch
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.errors import NumericalError
from edgeprune.model.gguf.blocks import block_type, packed
from edgeprune.model.quantised import SMALLEST_SCALE, QuantisedWeight, storable
from edgeprune.precision import WEIGHT_FORMATS, WeightFormat
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


@pytest.mark.parametrize("form", PACKED_FORMATS.values(), ids=PACKED_FORMATS)
def test_zero_bytes_are_zeros(form):
    blocks = torch.zeros(3, 2 * BYTES[form.name], dtype=torch.uint8)
    assert not dequantize(blocks.numpy(), block_type(form)).any()


@pytest.mark.parametrize(("form", "scale"), [("int8", 1e6), ("int8", 1 / 3), ("int4-32-asymmetric", 2.0**14)])
def test_a_scale_that_fp16_does_not_hold_is_named(form, scale):
    weight = random_codes(WEIGHT_FORMATS[form], 0)
    if weight.zeros is not None:
        weight.zeros.fill_(7)
    with pytest.raises(NumericalError, match=r"scales of layers.0.mlp.up"):
        packed("layers.0.mlp.up", QuantisedWeight(weight.form, weight.codes, weight.scales.fill_(scale), weight.zeros))
