"""ggml's own quantiser is called as llama.cpp calls it, and the recipes are those of its tool."""

from collections import Counter

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from edgeprune.precision import WEIGHT_FORMATS
from tools.bytes_table import bits_of as bits_of_form
from tools.ggml_files import RECIPES, bits_of, blocks_of, recipe, rounded_by_ggml

TYPES = [form.name.upper() for form in WEIGHT_FORMATS.values() if form.storage == "gguf"]
LLAMA_MATRICES = ("attention.q", "attention.k", "attention.v", "attention.o", "mlp.gate", "mlp.up", "mlp.down")


@pytest.fixture
def weight():
    return torch.randn(8, 512, generator=torch.Generator().manual_seed(0))


def weighted_error(weight, rounded, importance):
    return float(((weight - rounded).square() * importance).sum())


@pytest.mark.parametrize("type_name", TYPES)
def test_a_weight_is_rounded_to_the_bits_of_its_type(weight, type_name):
    blocks = blocks_of(weight.numpy(), np.ones(512, np.float32), type_name)
    assert 8 * blocks.nbytes == bits_of(type_name) * weight.numel()
    rounded = rounded_by_ggml(weight, torch.ones(512), type_name)
    np.testing.assert_array_equal(rounded.numpy(), gguf.dequantize(blocks, gguf.GGMLQuantizationType[type_name]))
    off = float((rounded - weight).norm() / weight.norm())
    assert 0 < off < 1.5 * 2.0 ** -int(type_name[1])  # steps of so many bits over about five deviations


@pytest.mark.parametrize("type_name", [name for name in TYPES if name != "Q8_0"])  # which takes no notice of it
def test_the_inputs_weigh_the_errors(weight, type_name):
    importance = torch.full((512,), 1e-3)
    importance[::8] = 10.0
    errors = [
        weighted_error(weight, rounded_by_ggml(weight, used, type_name), importance)
        for used in (importance, torch.ones(512))
    ]
    assert errors[0] < 0.9 * errors[1]


def test_rows_that_no_block_divides_are_filled_up_with_zeros(weight):
    narrow, importance = weight[:, :320], torch.rand(320, generator=torch.Generator().manual_seed(1))
    rounded = rounded_by_ggml(narrow, importance, "Q4_K")
    filled = rounded_by_ggml(F.pad(narrow, (0, 192)), F.pad(importance, (0, 192)), "Q4_K")
    assert torch.equal(rounded, filled[:, :320])
    assert not filled[:, 320:].any()
    with pytest.raises(ValueError, match="256 do not divide 320"):
        blocks_of(narrow.numpy(), importance.numpy(), "Q4_K")


def test_a_format_has_the_bits_of_its_type():
    assert [bits_of_form(WEIGHT_FORMATS[name.lower()]) for name in TYPES] == [bits_of(name) for name in TYPES]


@pytest.mark.parametrize(
    ("name", "types"),
    [
        # As llama.cpp lists the tensors of files that llama-quantize made of Llama 2 7B, less embedding and head.
        ("Q4_K_M", {"Q4_K": 192, "Q6_K": 32}),
        ("Q3_K_M", {"Q3_K": 128, "Q4_K": 92, "Q5_K": 4}),
    ],
)
def test_a_recipe_gives_the_types_that_the_tool_gives(name, types):
    layers = recipe(name, 32, [(matrix, 11008 if matrix == "mlp.down" else 4096) for matrix in LLAMA_MATRICES])
    assert Counter(form for layer in layers for form in layer.values()) == types


@pytest.mark.parametrize("name", RECIPES)
def test_rows_of_other_lengths_take_blocks_of_32(name):
    layers = recipe(name, 30, [(matrix, 1536 if matrix == "mlp.down" else 576) for matrix in LLAMA_MATRICES])
    assert {layer["mlp.down"][-1] for layer in layers} == {"K"}
    assert not any(form.endswith("K") for layer in layers for matrix, form in layer.items() if matrix != "mlp.down")
