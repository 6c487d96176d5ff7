"""Turning a model frees its weights of their grid and leaves its function as it is."""

import pytest
import torch

from edgeprune.model.forward import token_logits, weight_stream
from edgeprune.precision import WEIGHT_FORMATS
from edgeprune.pruning.grids import choose_grid
from tests.support.tiny import as_model, llama
from tools.turned import check_turned, turned


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model(request):
    """A tiny model whose norms weigh their channels differently, and whose matrices lie on a grid."""
    reference = llama(tie_word_embeddings=request.param)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in reference.named_parameters():
            if "norm" in name:
                weight.copy_(0.5 + torch.rand(weight.shape, generator=generator))
            elif "layers" in name:
                weight.copy_(on_grid(weight))
    return as_model(reference)


def on_grid(weight):
    form = WEIGHT_FORMATS["int4-32-asymmetric"]
    padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % 32))
    return choose_grid(padded, torch.ones(padded.shape[1]), form).nearest(padded).dequantised()[:, : weight.shape[1]]


def test_the_logits_stay(model):
    ids = torch.randint(101, (2, 20), generator=torch.Generator().manual_seed(0))
    result = turned(model)
    expected, logits = (token_logits(one.decoder, weight_stream(one), ids) for one in (model, result))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    check_turned(model, result, ids)
    assert not result.decoder.tie_word_embeddings


def test_the_weights_leave_their_grid_and_keep_their_columns_lengths(model):
    result = turned(model)
    for name in ("layers.0.mlp.gate", "layers.1.mlp.down"):
        before, after = (one.weights[name] for one in (model, result))
        errors = [float((on_grid(weight) - weight).norm() / weight.norm()) for weight in (before, after)]
        assert errors[0] < 1e-2 < errors[1]
    columns = [torch.cat([one.weights[f"layers.0.mlp.{name}"] for name in ("gate", "up")]) for one in (model, result)]
    torch.testing.assert_close(columns[0].norm(dim=0), columns[1].norm(dim=0))


def test_another_function_is_refused(model):
    other = turned(model)
    other.weights["layers.0.mlp.down"][0, 0] += 1.0
    with pytest.raises(ValueError, match="turning changed the logits"):
        check_turned(model, other, torch.arange(20)[None])
