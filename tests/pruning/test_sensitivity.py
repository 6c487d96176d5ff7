import numpy as np
import torch

from edgeprune.model.forward import (
    OUTPUT, embed, layer_weights, module_inputs, rotary_tables,
)
from edgeprune.pruning.allocate import MOMENT_DAMPING
from edgeprune.pruning.prune import features_of, select_heads
from edgeprune.pruning.score import numerical
from edgeprune.pruning.sensitivity import measure_sensitivities
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
