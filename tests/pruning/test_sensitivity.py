import numpy as np
import torch

from edgeprune.model.forward import (
    OUTPUT,
    embed,
    layer_weights,
    module_inputs,
    rotary_tables,
    token_losses,
    weight_stream,
)
from edgeprune.pruning.allocate import Widths
from edgeprune.pruning.compensate import MOMENT_DAMPING
from edgeprune.pruning.prune import METHODS, features_of, prune, select_heads
from edgeprune.pruning.score import numerical
from edgeprune.pruning.sensitivity import LEAST_RISE, measure_response, measure_sensitivities
from tests.tiny import as_model, llama


def test_attention_errors_are_the_least_squares_errors_relative_to_the_stream():
    model = as_model(llama())
    ids = torch.randint(0, 101, (6, 20), generator=torch.Generator().manual_seed(0))
    found = measure_sensitivities(model, ids, numerical, 0)
    assert found.attention.shape == (2, 2, 3)
    assert found.mlp.shape == (2, 65)
    hidden = embed(model, ids)
    weights = layer_weights(model, 0)
    inputs = module_inputs(model.decoder, 0, "attention", weights, hidden, rotary_tables(model.decoder, 20), 8)
    rows = (inputs / hidden.norm(dim=-1, keepdim=True)).flatten(0, 1).double()
    moments, weight = rows.T @ rows / len(rows), weights[OUTPUT["attention"]]
    _, heads = select_heads(
        lambda unit: numerical(weight, moments, unit, torch.Generator()), model.decoder.layers[0].attention, 2, 2
    )
    kept = features_of(heads, 8)
    ridge = torch.eye(48, dtype=torch.float64) * (MOMENT_DAMPING * moments.diagonal().mean() * len(rows)).sqrt()
    rows = torch.cat([rows, ridge])  # the damping as extra samples
    target = rows @ weight.double().T
    residual = target - rows[:, kept] @ torch.linalg.lstsq(rows[:, kept], target).solution
    assert np.isclose(found.attention[0, 1, 1], float(residual.square().sum() / ids.numel()), rtol=1e-4)


def test_errors_fall_with_the_width_and_end_at_zero():
    model = as_model(llama())
    ids = torch.randint(0, 101, (6, 20), generator=torch.Generator().manual_seed(0))
    found = measure_sensitivities(model, ids, numerical, 0)
    assert (np.diff(found.mlp, axis=1) <= 1e-12).all()
    assert (found.mlp[:, -1] == 0).all()
    assert (found.attention[:, -1, -1] == 0).all()
    assert (found.attention[:, :-1] > 0).all()


def test_the_response_is_the_measured_rise_of_the_loss_per_error():
    model = as_model(llama())
    ids = torch.randint(0, 101, (8, 20), generator=torch.Generator().manual_seed(0))
    raw = measure_sensitivities(model, ids, numerical, 0)
    found = measure_response(model, ids, raw, METHODS["default"], 0)
    widths = Widths(2, 3, 48)
    target = model.decoder.with_widths(*widths)
    small = dict(prune(model, target, ids[:4], METHODS["default"], 0))
    dense_loss, small_loss = (
        float(token_losses(decoder, weights, ids[4:]).mean())
        for decoder, weights in ((model.decoder, weight_stream(model)), (target, small.items()))
    )
    expected = max(small_loss - dense_loss, LEAST_RISE)
    assert np.isclose(found.uniform_loss(widths), expected, rtol=1e-3)
    assert (found.response > 0).all()
