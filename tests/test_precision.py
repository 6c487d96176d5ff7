"""The table of precisions, against the types of the libraries that it names."""

from __future__ import annotations

from typing import get_args

import numpy as np
import onnx
import pytest
import torch

from edgeprune.precision import PRECISIONS, GraphPrecision


def test_the_names_are_those_of_the_types():
    assert tuple(PRECISIONS) == get_args(GraphPrecision)
    assert get_args(GraphPrecision) == PRECISIONS


@pytest.mark.parametrize("name", PRECISIONS)
def test_every_library_stores_a_number_in_as_many_bytes(name):
    precision = PRECISIONS[name]
    onnx_type = onnx.helper.tensor_dtype_to_np_dtype(getattr(onnx.TensorProto, precision.onnx_type))
    sizes = {
        np.dtype(precision.numpy_dtype).itemsize,
        getattr(torch, precision.torch_dtype).itemsize,
        onnx_type.itemsize,
        precision.element_bytes,
        precision.matrix_bytes,
    }
    assert len(sizes) == 1
    assert not precision.is_quantised


def test_the_tolerance_grows_with_the_distance_between_numbers():
    by_distance = sorted(PRECISIONS, key=lambda name: torch.finfo(getattr(torch, PRECISIONS[name].torch_dtype)).eps)
    assert by_distance == ["fp32", "fp16", "bf16"]
    cosines, errors = zip(*(PRECISIONS[name].tolerance for name in by_distance), strict=True)
    assert list(cosines) == sorted(cosines, reverse=True)
    assert list(errors) == sorted(errors)


@pytest.mark.parametrize(("name", "bits"), [("int8", 8), ("int4", 4)])
def test_a_block_of_128_quantised_weights_has_one_scale_of_two_bytes(name, bits):
    precision = PRECISIONS[name]
    assert 128 * precision.matrix_bytes == 128 * bits / 8 + 2
    assert precision.is_quantised
    assert precision.tolerance is None  # no graph is written in it
    rest = PRECISIONS[precision.unquantised]
    assert (precision.element_bytes, precision.logit_bytes) == (rest.element_bytes, rest.logit_bytes)
