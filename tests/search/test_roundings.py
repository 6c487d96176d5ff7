"""The predicted losses of weight formats."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from edgeprune.model.attention import Tables, attend, attention_heads
from edgeprune.model.forward import add_module, embed, layer_weights, module_states, token_logits, weight_stream
from edgeprune.model.quantised import storable
from edgeprune.precision import CACHE_FORMATS, WEIGHT_FORMATS
from edgeprune.pruning.grids import choose_grid
from edgeprune.pruning.methods import METHODS
from edgeprune.pruning.moments import gram
from edgeprune.pruning.prune import prune
from edgeprune.pruning.quantize import gptq, relative_error
from edgeprune.pruning.score import numerical
from edgeprune.search import sensitivity
from edgeprune.search.roundings import GptqShares
from edgeprune.search.sensitivity import measure_sensitivities
from tests.support.gradients import module_energies
from tests.support.rounded_cache import rounded
from tests.support.tiny import as_model, llama

FORMATS = (WEIGHT_FORMATS["int8"], WEIGHT_FORMATS["int4-32"])
INT8 = CACHE_FORMATS["int8"]


def model_of(**config):
    return as_model(llama(hidden_size=96, intermediate_size=96, num_attention_heads=6, head_dim=16, **config))


def samples(count: int = sensitivity.ROUNDED_SAMPLES) -> torch.Tensor:
    return torch.randint(0, 101, (count, 20), generator=torch.Generator().manual_seed(0))


def measured(model, ids):
    return measure_sensitivities(model, ids, numerical, 0, FORMATS, FORMATS).roundings


def test_the_loss_of_a_module_is_the_change_of_its_output_weighted_by_the_gradient():
    model, ids = model_of(), samples()
    found = measured(model, ids)["int4-32"]
    assert found.attention.shape == found.mlp.shape == (2,)
    # The first MLP, with its own weights rounded on the mean squares of what they read.
    decoder, weights = model.decoder, layer_weights(model, 0)
    hidden, tables = embed(model, ids), Tables(decoder, ids.shape[1])
    add_module(decoder, 0, "attention", weights, hidden, tables)
    states = module_states(decoder, "mlp", weights, hidden)

    def output(changed):
        inner = F.silu(states @ changed["mlp.gate"].T) * (states @ changed["mlp.up"].T)
        return inner, inner @ changed["mlp.down"].T

    inner, dense = output(weights)
    energy = module_energies(model, ids)[0]["mlp"]
    read = {"mlp.gate": states, "mlp.up": states, "mlp.down": inner * energy.sqrt()[..., None]}
    rounded = {
        name: choose_grid(weights[name], inputs.flatten(0, 1).square().mean(0), FORMATS[1], "ends").nearest(
            weights[name]
        )
        for name, inputs in read.items()
    }
    off = output(weights | {name: weight.dequantised() for name, weight in rounded.items()})[1] - dense
    expected = (energy * off.square().sum(-1)).sum() / (2 * decoder.hidden_size * ids.numel())
    assert np.isclose(found.mlp[0], float(expected), rtol=1e-3)


def test_eight_bits_lose_a_hundredth_of_what_four_lose():
    found = measured(model_of(), samples())
    few, many = found["int4-32"], found["int8"]
    assert (many.attention < few.attention / 50).all()
    assert (many.mlp < few.mlp / 50).all()
    assert 0 < many.head < few.head / 50


def test_a_weight_on_the_grid_loses_nothing():
    model, ids = model_of(), samples()
    for name, shape in model.decoder.shapes().items():
        if len(shape) == 2:
            weight = model.weights[name]
            scales = storable(weight.abs().amax(dim=1, keepdim=True) / 127)
            model.weights[name] = (weight / scales).round().clamp(-127, 127) * scales
    found = measured(model, ids)["int8"]
    assert found.attention.max() < 1e-12
    assert found.mlp.max() < 1e-12
    assert found.head < 1e-9


def test_the_head_loses_the_divergence_of_its_logits():
    model, ids = model_of(tie_word_embeddings=False), samples()
    found = measured(model, ids)["int4-32"]
    assert found.embedding > 0
    # The same by the whole model with a rounded head, on the positions that are compared: all but none are left out.
    weights = dict(weight_stream(model))
    states_importance = torch.ones(96)
    rounded = choose_grid(weights["head"], states_importance, FORMATS[1]).nearest(weights["head"]).dequantised()
    dense = token_logits(model.decoder, weight_stream(model), ids).log_softmax(-1)
    small = token_logits(model.decoder, (weights | {"head": rounded}).items(), ids).log_softmax(-1)
    divergence = float((dense.exp() * (dense - small)).sum(-1).mean())
    assert np.isclose(found.head, divergence, rtol=0.3)  # another grid: that one is weighted


def test_a_tied_table_has_both_losses_in_one():
    model, ids = model_of(), samples()
    assert model.decoder.tie_word_embeddings
    found = measured(model, ids)["int4-32"]
    assert found.embedding == 0.0
    assert found.head > 0


def narrow_inputs(samples: int) -> torch.Tensor:
    """Returns inputs (samples, 64, 32) whose features depend on each other, which GPTQ makes use of."""
    generator = torch.Generator().manual_seed(0)
    few, mixed = torch.randn(samples, 64, 4, generator=generator), torch.randn(4, 32, generator=generator)
    return few @ mixed + 0.1 * torch.randn(samples, 64, 32, generator=generator)


@pytest.mark.parametrize(("name", "tolerance"), [("int8", 0.1), ("int4-32", 0.3)])
def test_the_share_that_gptq_leaves_holds_on_other_inputs(name, tolerance):
    form, inputs = WEIGHT_FORMATS[name], narrow_inputs(12)
    weight = torch.randn(1000, 32, generator=torch.Generator().manual_seed(1))
    share = GptqShares(weight, inputs[:8]).of(form)
    moments, others = (gram(part.flatten(0, 1)) for part in (inputs[:8], inputs[8:]))
    grid = choose_grid(weight, moments.diagonal(), form, "ends")
    errors = [
        relative_error(weight, rounded.dequantised(), others)
        for rounded in (gptq(weight, moments, grid), grid.nearest(weight))
    ]
    assert share < 0.5
    assert np.isclose(share, errors[0] / errors[1], rtol=tolerance)


def test_gptq_that_the_walk_does_not_take_changes_no_prediction():
    form, weight = WEIGHT_FORMATS["int4-32"], torch.randn(100, 32, generator=torch.Generator().manual_seed(1))
    inputs = narrow_inputs(4)
    assert GptqShares(weight, inputs[:, :7]).of(form) == 1.0  # too few tokens
    on_grid = choose_grid(weight, torch.ones(32), form).nearest(weight).dequantised()
    assert GptqShares(on_grid, inputs).of(form) == 1.0


def test_an_untied_head_is_predicted_as_the_walk_rounds_it(monkeypatch):
    monkeypatch.setattr(sensitivity, "ROUNDED_SAMPLES", 16)
    model, ids = model_of(tie_word_embeddings=False), samples(16)
    found = measured(model, ids)["int4-32"]
    target = model.decoder.with_format(None, FORMATS[1])
    weights = dict(prune(model, target, ids, METHODS["default"], 0))
    changed = dict(weight_stream(model)) | {"head": weights["head"].dequantised()}
    dense = token_logits(model.decoder, weight_stream(model), ids).log_softmax(-1)
    small = token_logits(model.decoder, changed.items(), ids).log_softmax(-1)
    divergence = float((dense.exp() * (dense - small)).sum(-1).mean())
    assert np.isclose(found.head, divergence, rtol=0.4)


def test_a_module_keeps_the_mean_of_the_shares_that_gptq_leaves(monkeypatch):
    model, ids = model_of(), samples(16)
    left = measured(model, ids)
    shares, whole = {form.name: [] for form in FORMATS}, GptqShares.of

    def keep(self, form):
        shares[form.name].append(whole(self, form))
        return 1.0

    monkeypatch.setattr(GptqShares, "of", keep)
    nearest = measured(model, ids)
    for form in shares:
        # From the last module to the first, of each the matrices before the activation, then the output projection.
        means = np.reshape(shares[form][:8], (4, 2)).mean(axis=1)[::-1]
        assert means.mean() < 0.95
        mine, whole_losses = left[form], nearest[form]
        assert np.allclose(
            [mine.attention[0], mine.mlp[0], mine.attention[1], mine.mlp[1]] / means,
            [whole_losses.attention[0], whole_losses.mlp[0], whole_losses.attention[1], whole_losses.mlp[1]],
        )


def test_the_loss_of_a_cache_is_the_change_of_attentions_output_weighted_by_the_gradient():
    """By numpy's codes: the scales are those of the samples' own keys and values."""
    model, ids = model_of(num_key_value_heads=2), samples()
    found = measure_sensitivities(model, ids, numerical, 0, caches=(INT8,)).caches["int8"].attention
    decoder, weights, tables = model.decoder, layer_weights(model, 0), Tables(model.decoder, ids.shape[1])
    attention = decoder.layers[0].attention
    states = module_states(decoder, "attention", weights, embed(model, ids))
    query, *cached = attention_heads(states, weights, attention, tables, decoder.norm_eps)
    scales = [part.abs().amax(dim=(0, 2), keepdim=True).numpy() / 127 for part in cached]
    held = [rounded(part, scale) for part, scale in zip(cached, scales, strict=True)]
    off = (attend(query, *held, attention, None) - attend(query, *cached, attention, None)) @ weights["attention.o"].T
    energy = module_energies(model, ids)[0]["attention"]
    expected = (energy * off.square().sum(-1)).sum() / (2 * decoder.hidden_size * ids.numel())
    assert np.isclose(found[0], float(expected), rtol=1e-3)
    assert (found > 0).all()


def test_a_cache_in_fp8_loses_more_than_one_in_int8():
    """Three bits of a mantissa against seven of a number of one size."""
    found = measure_sensitivities(model_of(), samples(), numerical, 0, caches=tuple(CACHE_FORMATS.values())).caches
    assert (found["fp8"].attention > 2 * found["int8"].attention).all()
