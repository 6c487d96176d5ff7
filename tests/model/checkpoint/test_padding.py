"""Heads of zeros behind a model's own, which change nothing that it computes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.model.checkpoint.padding import padded_heads, without_padding
from edgeprune.model.forward import token_losses
from tests.support.shapes import uniform

SMALL = uniform(32, 2, (2, 1, 8), 24, 50)


def weights(decoder, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in decoder.shapes().items()}


@pytest.mark.parametrize("target", [SMALL.with_widths(1, 4, 24), SMALL.with_widths(2, 2, 24)])
def test_a_padded_model_computes_the_same(target):
    ids = torch.randint(0, 50, (3, 12), generator=torch.Generator().manual_seed(1))
    own = weights(SMALL)
    padded = dict(padded_heads(SMALL, target, own.items()))
    assert {name: tuple(weight.shape) for name, weight in padded.items()} == target.shapes()
    expected = token_losses(SMALL, own.items(), ids)
    assert torch.allclose(token_losses(target, padded.items(), ids), expected, atol=1e-5)


@given(groups=st.integers(1, 3), heads=st.integers(2, 4))
def test_without_its_padding_every_weight_is_as_it_was(groups, heads):
    own = weights(SMALL)
    target = SMALL.with_widths(groups, heads, 24)
    for name, weight in padded_heads(SMALL, target, own.items()):
        restored = without_padding(weight, SMALL.shapes()[name])
        assert torch.equal(restored, own[name])
        assert restored.is_contiguous()


def test_a_model_that_needs_no_heads_passes_untouched():
    own = weights(SMALL)
    assert all(weight is own[name] for name, weight in padded_heads(SMALL, SMALL, own.items()))
