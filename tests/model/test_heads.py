"""Heads of zeros beside a model's own: what is put in is what comes out, in floats and in codes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.errors import InputError
from edgeprune.model.heads import filled, without_filling
from edgeprune.precision import WEIGHT_FORMATS
from edgeprune.pruning.grids import choose_grid
from tests.support.shapes import uniform

WIDE = uniform(64, 1, (4, 2, 32), 24, 50)  # 2 groups of 2 heads
HEADS = st.tuples(st.integers(2, 3), st.integers(2, 4))


def matrix(shape, form=None):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return weight if form is None else choose_grid(weight, torch.ones(shape[1]), form, "starts").nearest(weight)


@given(HEADS, st.sampled_from([None, "int8", "int4-32", "int4-32-asymmetric"]))
def test_without_its_filling_every_weight_is_as_it_was(widths, named):
    target = WIDE.with_widths(*widths, 24)
    for name, shape in WIDE.shapes().items():
        form = WEIGHT_FORMATS[named] if named and len(shape) == 2 and shape[1] % 32 == 0 else None
        weight = matrix(shape, form)
        stored = filled(WIDE, target, name, weight)
        assert tuple(stored.shape) == target.shapes()[name]
        restored = without_filling(WIDE, target, name, stored)
        if form is None:
            assert torch.equal(restored, weight)
        else:
            assert torch.equal(restored.dequantised(), weight.dequantised())
            assert all(torch.equal(restored.parts[part], own) for part, own in weight.parts.items())


@given(HEADS, st.sampled_from(["int8", "int4-32", "int4-32-asymmetric"]), st.sampled_from(["q", "k", "v", "o"]))
def test_heads_in_codes_stand_where_heads_in_floats_do(widths, named, part):
    target, name = WIDE.with_widths(*widths, 24), f"layers.0.attention.{part}"
    weight = matrix(WIDE.shapes()[name], WEIGHT_FORMATS[named])
    values = filled(WIDE, target, name, weight.dequantised())
    assert torch.equal(filled(WIDE, target, name, weight).dequantised(), values)


def test_groups_across_heads_cannot_be_taken_apart():
    decoder = uniform(64, 1, (4, 2, 16), 24, 50)
    weight = matrix((64, 64), WEIGHT_FORMATS["int4-32"])
    behind = filled(decoder, decoder.with_widths(3, 2, 24), "layers.0.attention.o", weight)
    assert tuple(behind.shape) == (64, 96)
    with pytest.raises(InputError, match="groups across the heads of 16") as caught:
        filled(decoder, decoder.with_widths(2, 4, 24), "layers.0.attention.o", weight)
    assert "--no-checkpoint" in caught.value.remedy
