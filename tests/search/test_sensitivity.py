import io

import numpy as np
import torch

from edgeprune.model.attention import Tables
from edgeprune.model.forward import OUTPUT, embed, layer_weights, module_inputs
from edgeprune.precision import CACHE_FORMATS
from edgeprune.progress import Silent
from edgeprune.pruning.compensate import MOMENT_DAMPING
from edgeprune.pruning.methods import METHODS
from edgeprune.pruning.prune import prune
from edgeprune.pruning.score import Projection, flap, numerical
from edgeprune.pruning.select import features_of, select_heads
from edgeprune.search.sensitivity import measure_scores, measure_sensitivities, sensitivities_of
from tests.support.gradients import module_energies
from tests.support.tiny import as_model, llama


def test_errors_are_least_squares_errors_weighted_by_the_gradient():
    model = as_model(llama())
    ids = torch.randint(0, 101, (6, 20), generator=torch.Generator().manual_seed(0))
    found = measure_sensitivities(model, ids, numerical, 0)
    assert found.attention.shape == (2, 3, 3)
    assert found.mlp.shape == (2, 65)
    energy = module_energies(model, ids)[0]["attention"]
    weights = layer_weights(model, 0)
    inputs = module_inputs(model.decoder, 0, "attention", weights, embed(model, ids), Tables(model.decoder, 20), 8)
    rows = (inputs * energy.sqrt()[..., None]).flatten(0, 1).double() / (2 * 48 * ids.numel()) ** 0.5
    weight = weights[OUTPUT["attention"]]
    projection = Projection(weight, rows.T @ rows, rows[None].float(), torch.Generator())
    _, heads = select_heads(
        lambda unit, keep: numerical(projection, unit, keep), model.decoder.layers[0].attention, 2, 2
    )
    kept = features_of(heads, 8)
    target = rows @ weight.double().T
    assert np.isclose(found.attention[0, 0, 0], float(target.square().sum()), rtol=0.02)  # nothing is left
    moments = rows.T @ rows
    ridge = torch.eye(48, dtype=torch.float64) * (MOMENT_DAMPING * moments.diagonal().mean()).sqrt()
    rows = torch.cat([rows, ridge])  # the damping as extra samples
    target = rows @ weight.double().T
    residual = target - rows[:, kept] @ torch.linalg.lstsq(rows[:, kept], target).solution
    assert np.isclose(found.attention[0, 2, 1], float(residual.square().sum()), rtol=1e-4)


def test_errors_fall_with_the_width_and_end_at_zero():
    model = as_model(llama())
    ids = torch.randint(0, 101, (6, 20), generator=torch.Generator().manual_seed(0))
    found = measure_sensitivities(model, ids, numerical, 0)
    assert (np.diff(found.mlp, axis=1) <= 1e-12).all()
    assert (found.mlp[:, -1] == 0).all()
    assert (found.attention[:, -1, -1] == 0).all()
    assert (found.attention[:, :-1] > 0).all()


def test_scores_of_all_layers_are_those_of_the_score_on_the_dense_stream():
    model = as_model(llama())
    ids = torch.randint(0, 101, (6, 20), generator=torch.Generator().manual_seed(0))
    groups, channels = measure_scores(model, ids, flap, 0)
    assert [len(row) for row in groups] == [2, 2]
    assert [len(row) for row in channels] == [64, 64]
    weights = layer_weights(model, 0)
    inputs = module_inputs(model.decoder, 0, "attention", weights, embed(model, ids), Tables(model.decoder, 20), 8)
    rows = inputs.flatten(0, 1).double()
    projection = Projection(weights[OUTPUT["attention"]], rows.T @ rows, inputs, torch.Generator())
    assert np.allclose(groups[0], flap(projection, 24, 1), rtol=1e-4)


def test_a_padding_token_of_zeros_at_the_start_changes_nothing_else():
    """It stays zero in all layers; norms would make its gradient infinite and its weight in least squares too."""
    model = as_model(llama(num_hidden_layers=6))
    model.weights["embedding"][0] = 0.0
    given = torch.randint(1, 101, (8, 24), generator=torch.Generator().manual_seed(3))
    given[:, 0] = 0
    sensitivities = measure_sensitivities(model, given, METHODS["default"].score, 0)
    assert np.isfinite(sensitivities.attention).all()
    assert np.isfinite(sensitivities.mlp).all()
    target = model.decoder.with_widths(1, 3, 40)
    assert all(weight.isfinite().all() for _, weight in prune(model, target, given, METHODS["default"], 0))


def test_what_is_kept_is_read_again_but_not_for_another_score(tmp_path, monkeypatch):
    """`default` may stand for another score in another version."""
    monkeypatch.setenv("EDGEPRUNE_CACHE", str(tmp_path))
    model = as_model(llama())
    ids = torch.randint(0, 101, (4, 16), generator=torch.Generator().manual_seed(0)).numpy()
    first = sensitivities_of(model, ids, "default", 0, Silent())
    assert len(list(tmp_path.rglob("*.npz"))) == 1
    again = sensitivities_of(model, ids, "default", 0, Silent())
    assert again.mlp.tolist() == first.mlp.tolist()
    assert len(list(tmp_path.rglob("*.npz"))) == 1
    formats = tuple(CACHE_FORMATS.values())
    cached = sensitivities_of(model, ids, "default", 0, Silent(), caches=formats).caches
    assert len(list(tmp_path.rglob("*.npz"))) == 2
    read = sensitivities_of(model, ids, "default", 0, Silent(), caches=formats).caches
    assert len(list(tmp_path.rglob("*.npz"))) == 2
    assert [one.by_layer.tolist() for one in read.values()] == [one.by_layer.tolist() for one in cached.values()]
    monkeypatch.setitem(METHODS, "default", METHODS["magnitude+ls"])
    other = sensitivities_of(model, ids, "default", 0, Silent())
    assert len(list(tmp_path.rglob("*.npz"))) == 3
    assert other.mlp.tolist() != first.mlp.tolist()


def test_a_damaged_file_is_measured_again(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEPRUNE_CACHE", str(tmp_path))
    model = as_model(llama())
    ids = np.random.default_rng(0).integers(0, 101, (4, 12))
    first = sensitivities_of(model, ids, "default", 0, Silent())
    (path,) = tmp_path.rglob("*.npz")
    whole = path.read_bytes()
    other = io.BytesIO()
    np.savez(other, attention=first.attention[:1], mlp=first.mlp, response=first.response)
    for data in (b"", whole[: len(whole) // 2], b"no archive", other.getvalue()):
        path.write_bytes(data)
        assert sensitivities_of(model, ids, "default", 0, Silent()).mlp.tolist() == first.mlp.tolist()
        assert path.read_bytes() == whole
