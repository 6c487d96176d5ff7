"""Matrices as other programs pack them: the same floats as these programs read, whatever the shapes."""

import pytest
import torch

from edgeprune.errors import InputError
from edgeprune.model.checkpoint.layouts import ALL, FLOAT8, FLOATS, Awq, Gptq, Packed, Scaled
from tests.support.foreign import arguments, awq, compressed, fp8, gptq, ordered

TYPES = {
    torch.int32: "I32",
    torch.int64: "I64",
    torch.int8: "I8",
    torch.float8_e4m3fn: FLOAT8,
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
WEIGHT = torch.randn(40, 96, generator=torch.Generator().manual_seed(0))


def assert_read(layout, packed):
    """Exactly the floats, and parts of the types and shapes that the layout says."""
    parts, floats = packed
    expected = layout.parts(tuple(WEIGHT.shape))
    assert expected.keys() - {layout.optional} <= parts.keys() <= expected.keys()
    for name, part in parts.items():
        types, shapes = expected[name]
        assert TYPES[part.dtype] in types
        assert tuple(part.shape) in shapes
    values = layout.values(parts, tuple(WEIGHT.shape))
    assert values.dtype == torch.float32
    assert torch.equal(values, floats)


COMPRESSED = {
    "int4 in groups": ("pack-quantized", 4, {"strategy": "group", "group_size": 32}, (1, 32)),
    "int4 in other groups": ("pack-quantized", 4, {"strategy": "group", "group_size": 24}, (1, 24)),
    "int2 in groups": ("pack-quantized", 2, {"strategy": "group", "group_size": 16}, (1, 16)),
    "int8 packed": ("pack-quantized", 8, {"strategy": "channel"}, (1, ALL)),
    "int4 by matrix": ("pack-quantized", 4, {"strategy": "tensor"}, (ALL, ALL)),
    "int8": ("int-quantized", 8, {"strategy": "channel"}, (1, ALL)),
    "int8 in groups": ("naive-quantized", 8, {"strategy": "group", "group_size": 48}, (1, 48)),
    "int8 by matrix": ("int-quantized", 8, {"strategy": "tensor"}, (ALL, ALL)),
    "fp8 by matrix": ("float-quantized", 8, {"strategy": "tensor", "type": "float"}, (ALL, ALL)),
    "fp8 by output": ("float-quantized", 8, {"strategy": "channel", "type": "float"}, (1, ALL)),
    "fp8 in blocks": (
        "naive-quantized",
        8,
        {"strategy": "block", "block_structure": [32, 64], "type": "float"},
        (32, 64),
    ),
}


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(("form", "bits", "more", "block"), COMPRESSED.values(), ids=COMPRESSED)
def test_compressed_tensors(form, bits, more, block, asymmetric):
    if asymmetric and ("float" in more.values() or (form == "pack-quantized" and block == (ALL, ALL))):
        return  # there is none
    packed = compressed(WEIGHT, form, arguments(bits, symmetric=not asymmetric, **more))
    if form == "pack-quantized":
        layout = Packed(bits, block, asymmetric)
    else:
        layout = Scaled(FLOAT8 if "type" in more else "I8", "weight_scale", block, asymmetric)
    assert_read(layout, packed)


@pytest.mark.parametrize("asymmetric", [False, True])
def test_inputs_in_the_order_of_their_moments(asymmetric):
    args = arguments(4, symmetric=not asymmetric, strategy="group", group_size=32)
    packed = ordered(WEIGHT, args)
    assert_read(Packed(4, (1, 32), asymmetric), packed)
    parts, floats = packed
    unset = parts | {"weight_g_idx": torch.full_like(parts["weight_g_idx"], -1)}
    assert not torch.equal(Packed(4, (1, 32), asymmetric).values(unset, tuple(WEIGHT.shape)), floats)


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("group", [32, 40, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq(bits, group, version, symmetric, in_order):
    """Zeros of 0 among them, which borrow from their neighbours in the first version; a last group may not be whole."""
    layout = Gptq(bits, (1, ALL if group == -1 else group), version == 1, not in_order)
    parts, floats = gptq(WEIGHT.abs() if not symmetric else WEIGHT, bits, group, version, symmetric, not in_order)
    assert_read(layout, (parts, floats))
    if in_order:
        del parts["g_idx"]
        assert_read(layout, (parts, floats))


@pytest.mark.parametrize("group", [32, -1])
def test_awq(group):
    assert_read(Awq((1, ALL if group == -1 else group)), awq(WEIGHT, group))


@pytest.mark.parametrize("block", [[8, 32], [40, 96], None])
def test_fp8_in_blocks(block):
    layout = Scaled(FLOAT8, "weight_scale_inv", tuple(block or (ALL, ALL)), ordered=False)
    parts, floats = fp8(WEIGHT, block)
    assert_read(layout, (parts, floats))
    if block is None:  # a scalar in other versions
        assert_read(layout, (parts | {"weight_scale_inv": parts["weight_scale_inv"].reshape(())}, floats))


def test_the_last_blocks_need_not_be_whole():
    """As DeepSeek's own code has them."""
    values, scales = WEIGHT.to(torch.float8_e4m3fn), torch.rand(2, 2)
    layout = Scaled(FLOAT8, "weight_scale_inv", (32, 64), ordered=False)
    assert layout.parts((40, 96))["weight_scale_inv"] == (FLOATS, ((2, 2),))
    read = layout.values({"weight": values, "weight_scale_inv": scales}, (40, 96))
    assert torch.equal(read[32:, 64:], values.float()[32:, 64:] * scales[1, 1])
    assert torch.equal(read[:32, :64], values.float()[:32, :64] * scales[0, 0])


def test_a_group_that_there_is_not_is_damage():
    parts, _ = gptq(WEIGHT, 4, 32)
    for wrong in (3, -2):
        groups = parts["g_idx"].index_fill(0, torch.tensor([5]), wrong)
        with pytest.raises(InputError, match="of the group . of 3"):
            Gptq(4, (1, 32), True, True).values(parts | {"g_idx": groups}, (40, 96))
