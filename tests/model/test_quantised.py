"""Weights of few bits stand for (code - zero) * scale, and their scales are the same in every float type."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.errors import InputError
from edgeprune.model.quantised import QuantisedWeight, storable
from edgeprune.precision import WEIGHT_FORMATS


def test_a_code_stands_for_a_multiple_of_its_groups_scale():
    codes = torch.tensor([[1, -2, 7, -8], [0, 3, -1, 5]], dtype=torch.int8)
    scales = torch.tensor([[0.5, 0.25], [2.0, 1.0]])
    symmetric = QuantisedWeight(WEIGHT_FORMATS["int4-32"], codes, scales)
    assert symmetric.dequantised().tolist() == [[0.5, -1.0, 1.75, -2.0], [0.0, 6.0, -1.0, 5.0]]
    zeros = torch.tensor([[1, -1], [0, 5]], dtype=torch.int8)
    shifted = QuantisedWeight(WEIGHT_FORMATS["int4-32-asymmetric"], codes, scales, zeros)
    assert shifted.dequantised().tolist() == [[0.0, -1.5, 2.0, -1.75], [0.0, 6.0, -6.0, 0.0]]
    first, second = shifted.split([1, 1])
    assert torch.equal(torch.cat([first.dequantised(), second.dequantised()]), shifted.dequantised())
    assert second.shape == (1, 4)


@pytest.mark.parametrize("name", ["int8", "int4-32", "int4-32-asymmetric"])
def test_outputs_and_inputs_of_zeros_stand_behind_the_own(name):
    codes = torch.ones(2, 64, dtype=torch.int8)
    scales = torch.full((2, WEIGHT_FORMATS[name].groups_of(64)), 0.5)
    zeros = torch.full_like(scales, -1, dtype=torch.int8) if name.endswith("asymmetric") else None
    weight = QuantisedWeight(WEIGHT_FORMATS[name], codes, scales, zeros)
    padded = weight.padded((3, 128))
    assert padded.scales.shape == (3, WEIGHT_FORMATS[name].groups_of(128))
    assert torch.equal(padded.dequantised()[:2, :64], weight.dequantised())
    assert not padded.dequantised()[2:].any()
    assert not padded.dequantised()[:, 64:].any()
    if name != "int8":
        with pytest.raises(InputError, match="groups of 32, which do not divide 80 inputs"):
            weight.padded((2, 80))


@given(st.floats(2.0**-17, 6e4), st.booleans())
def test_scales_are_equal_in_fp32_fp16_and_bf16(value, is_asymmetric):
    scale = storable(torch.tensor(value), is_asymmetric)
    assert scale == scale.half().float() == scale.bfloat16().float()
    assert abs(float(scale) / value - 1) <= 2 ** -(7 if is_asymmetric else 8)


@given(st.floats(0, 4e3), st.integers(0, 15))
def test_the_least_value_of_an_asymmetric_group_is_a_number_of_fp16(value, steps):
    least = -steps * storable(torch.tensor(value), is_asymmetric=True)
    assert least == least.half().float()


def test_scales_are_rounded_as_bf16_rounds():
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0)).abs()
    assert torch.equal(storable(values), values.bfloat16().float())


def test_a_scale_is_never_zero():
    assert float(storable(torch.zeros(()))) > 0
