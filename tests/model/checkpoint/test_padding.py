"""Heads of zeros behind a model's own, which change nothing that it computes."""

import pytest
import torch

from edgeprune.model.checkpoint.padding import padded_heads
from edgeprune.model.forward import token_losses
from tests.support.shapes import uniform

SMALL = uniform(32, 2, (2, 1, 8), 24, 50)


def weights(decoder, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in decoder.shapes().items()}


@pytest.mark.parametrize("own, widths", [((1, 2), (1, 4)), ((1, 2), (2, 2)), ((2, 2), (2, 3)), ((2, 1), (3, 2))])
def test_a_padded_model_computes_the_same(own, widths):
    """Also where heads of zeros stand between the model's own."""
    decoder, target = SMALL.with_widths(*own, 24), SMALL.with_widths(*widths, 24)
    ids = torch.randint(0, 50, (3, 12), generator=torch.Generator().manual_seed(1))
    own = weights(decoder)
    padded = dict(padded_heads(decoder, target, own.items()))
    assert {name: tuple(weight.shape) for name, weight in padded.items()} == target.shapes()
    expected = token_losses(decoder, own.items(), ids)
    assert torch.allclose(token_losses(target, padded.items(), ids), expected, atol=1e-5)


def test_a_model_that_needs_no_heads_passes_untouched():
    own = weights(SMALL)
    assert all(weight is own[name] for name, weight in padded_heads(SMALL, SMALL, own.items()))
