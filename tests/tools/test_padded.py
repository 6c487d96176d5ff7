"""A model with rows filled up is the same function, and gives its own weights back."""

import pytest
import torch

from edgeprune.model.forward import token_logits, weight_stream
from edgeprune.model.quantised import QuantisedWeight
from edgeprune.precision import WEIGHT_FORMATS
from edgeprune.pruning.methods import DEFAULT, METHODS
from edgeprune.pruning.prune import prune
from tests.support.tiny import as_model, llama
from tools.padded import narrowed, padded


@pytest.fixture
def model():
    """A tiny model of 48 channels, 6 heads of 8 and 64 channels of its MLPs, whose norms weigh channels differently."""
    reference = llama(tie_word_embeddings=False)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in reference.named_parameters():
            if "norm" in name:
                weight.copy_(0.5 + torch.rand(weight.shape, generator=generator))
    return as_model(reference)


def test_the_logits_stay(model):
    ids = torch.randint(101, (2, 20), generator=torch.Generator().manual_seed(0))
    wide = padded(model, 256)
    shapes = [shape for name, shape in wide.decoder.shapes().items() if name.startswith("layers.") and len(shape) == 2]
    assert all(columns % 256 == 0 for _, columns in shapes)
    expected, logits = (token_logits(one.decoder, weight_stream(one), ids) for one in (model, wide))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_its_own_weights_come_back(model):
    wide = padded(model, 256)
    back = dict(narrowed(weight_stream(wide), model.decoder, model.weights))
    assert back.keys() == model.decoder.shapes().keys()
    assert all(torch.equal(weight, model.weights[name]) for name, weight in back.items())


def test_what_is_filled_up_stays_zero_when_it_is_rounded_on_the_walk(model):
    wide, form = padded(model, 256), WEIGHT_FORMATS["q4_k"]
    ids = torch.randint(101, (8, 40), generator=torch.Generator().manual_seed(0))
    shapes = model.decoder.shapes()
    rounded = prune(wide, wide.decoder.with_format(form), ids, METHODS[DEFAULT], 0)
    for name, weight in rounded:
        if isinstance(weight, QuantisedWeight):
            rows, columns = shapes[name]
            values = weight.dequantised()
            assert not values[rows:].any()
            assert not values[:, columns + -columns % form.group :].any()  # behind the last group that is used
