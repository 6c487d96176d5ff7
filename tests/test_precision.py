"""The table of precisions, against the types of the libraries that it names."""

from __future__ import annotations

from typing import get_args

import numpy as np
import onnx
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.errors import InputError
from edgeprune.precision import PRECISIONS, WEIGHT_FORMATS, GraphPrecision


def test_the_names_are_those_of_the_types():
    assert tuple(PRECISIONS) == get_args(GraphPrecision)


@pytest.mark.parametrize("name", PRECISIONS)
def test_every_library_stores_a_number_in_as_many_bytes(name):
    precision = PRECISIONS[name]
    onnx_type = onnx.helper.tensor_dtype_to_np_dtype(getattr(onnx.TensorProto, precision.onnx_type))
    sizes = {
        np.dtype(precision.numpy_dtype).itemsize,
        getattr(torch, precision.torch_dtype).itemsize,
        onnx_type.itemsize,
        precision.element_bytes,
    }
    assert len(sizes) == 1


def test_the_tolerance_grows_with_the_distance_between_numbers():
    by_distance = sorted(PRECISIONS, key=lambda name: torch.finfo(getattr(torch, PRECISIONS[name].torch_dtype)).eps)
    assert by_distance == ["fp32", "fp16", "bf16"]
    cosines, errors = zip(*(PRECISIONS[name].tolerance for name in by_distance), strict=True)
    assert list(cosines) == sorted(cosines, reverse=True)
    assert list(errors) == sorted(errors)


PLAIN = sorted(name for name, form in WEIGHT_FORMATS.items() if form.storage != "gguf")


@given(st.sampled_from(PLAIN), st.integers(1, 40), st.integers(1, 8), st.sampled_from([2, 4]))
def test_a_matrix_is_its_codes_scales_and_offsets(name, out_features, groups, scale_bytes):
    form = WEIGHT_FORMATS[name]
    in_features = groups * (form.group or 16)
    scales = out_features * (groups if form.group else 1)
    offset_bits = {None: 0, "zero": form.bits, "minimum": 8 * scale_bytes}[form.offset]
    own = 8 if form.e4m3_scales else 8 * scale_bytes
    bits = form.bits * out_features * in_features + scales * (own + offset_bits)
    assert form.stored_bytes(out_features, in_features, scale_bytes) == -(-bits // 8)
    if form.levels == "whole":
        assert form.most - form.least + 1 == 2**form.bits - (form.bits == 8)


@pytest.mark.parametrize("name", [name for name, form in WEIGHT_FORMATS.items() if form.storage == "gguf"])
def test_a_matrix_of_ggmls_blocks_has_their_bytes(name):
    inputs, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[name.upper()]]
    form = WEIGHT_FORMATS[name]
    assert form.multiple == inputs
    assert form.stored_bytes(3, 4 * inputs, scale_bytes=4) == 3 * 4 * block_bytes
    assert form.weight_bits == 8 * block_bytes / inputs


def test_the_bits_of_a_weight_count_its_share_of_scales_and_offsets():
    bits = {"int8": 8, "int4-64": 4.25, "int4-32": 4.5, "int4-32-asymmetric": 4.625, "int4-offset": 4.5}
    assert {name: WEIGHT_FORMATS[name].weight_bits for name in bits} == bits


def test_floats_of_few_bits_take_eight_bits_and_four_and_a_half():
    fp8, nvfp4 = WEIGHT_FORMATS["fp8"], WEIGHT_FORMATS["nvfp4"]
    assert fp8.stored_bytes(64, 256) == 64 * 256 + 64 * 2
    assert nvfp4.stored_bytes(64, 256) == 64 * 256 * 4.5 / 8
    assert (fp8.least, fp8.most, nvfp4.least, nvfp4.most) == (-448, 448, -6, 6)


def test_groups_that_do_not_divide_are_refused_by_name():
    with pytest.raises(InputError, match="int4-64 has groups of 64, which do not divide 96 inputs") as caught:
        WEIGHT_FORMATS["int4-64"].groups_of(96)
    assert "multiples of 64" in caught.value.remedy
