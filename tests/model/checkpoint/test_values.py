"""The codes of weights that a checkpoint holds the values of, from these and their scales alone."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load

from edgeprune.model.checkpoint.values import SCALES_FILE, codes_of, parts_of, scale_entries, with_values
from tests.support.quantised import PACKED_FORMATS, random_codes
from tests.support.roundings import INT8, OFFSET
from tests.support.shapes import uniform

DECODER = replace(uniform(128, 1, (2, 2, 32), 192, 50), tie_word_embeddings=False)
FORMATS = PACKED_FORMATS | {OFFSET.name: OFFSET}


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_codes_follow_from_values_and_scales(tmp_path, form):
    decoder = DECODER.with_formats([(OFFSET, INT8)], form, INT8)
    weights = {
        name: random_codes(decoder.weight_formats[name], *shape)
        if name in decoder.weight_formats
        else torch.ones(shape)
        for name, shape in decoder.shapes().items()
    }
    weight = weights["embedding"]
    weight.codes[0], weight.codes[1] = form.least, 0
    if form.offset != "minimum":  # beside which codes of the smallest steps make no difference
        weight.scales[2], weight.scales[3] = 2.0**-24, 60000.0
    stream = dict(with_values(decoder, weights.items(), tmp_path))
    parts = load((tmp_path / SCALES_FILE).read_bytes())
    assert {name: (part.dtype, tuple(part.shape)) for name, part in parts.items()} == scale_entries(decoder)
    by_value = {"embedding", *(f"layers.0.attention.{name}" for name in "qkvo")}
    assert {name.rpartition(".")[0] for name in parts} == by_value
    for name, one in weights.items():
        if name not in by_value:
            assert stream[name] is one
            continue
        assert torch.equal(stream[name], one.dequantised())
        found = codes_of(one.form, stream[name], **{part: parts[f"{name}.{part}"] for part in parts_of(one.form)})
        assert found.codes.dtype == torch.int8
        assert found.parts.keys() == one.parts.keys()
        assert all(torch.equal(part, one.parts[key]) for key, part in found.parts.items())


def test_values_that_are_far_from_zero_beside_their_steps_stay_the_same(tmp_path):
    """Where fp32 does not tell all codes apart, others stand for the same numbers."""
    weight = random_codes(OFFSET, 64, 128)
    weight.scales[:] = 2.0**-24
    values = weight.dequantised()
    found = codes_of(OFFSET, values, weight.scales, minima=weight.minima)
    assert torch.equal(found.dequantised(), values)


def test_a_model_without_such_weights_needs_no_file(tmp_path):
    table = torch.randn(50, 128)
    assert dict(with_values(DECODER.with_format(INT8), [("embedding", table)], tmp_path))["embedding"] is table
    assert not list(tmp_path.iterdir())
