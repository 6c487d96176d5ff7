"""The measured response of widths and formats."""

from dataclasses import replace

import numpy as np
import torch

from edgeprune.model.cache import cache_scales, with_cache
from edgeprune.model.forward import token_logits, weight_stream
from edgeprune.precision import CACHE_FORMATS, WEIGHT_FORMATS
from edgeprune.pruning.methods import METHODS
from edgeprune.pruning.prune import prune
from edgeprune.pruning.score import numerical
from edgeprune.search.response import measure_response, probe_widths, probed_layers, probes_of
from edgeprune.search.roundings import coarsest
from edgeprune.search.sensitivity import measure_sensitivities
from edgeprune.search.widths import Widths
from tests.support.tiny import as_model, llama

FORMATS = (WEIGHT_FORMATS["int8"], WEIGHT_FORMATS["int4-32"])


def divergence(model, target, ids) -> float:
    """The mean divergence of a small model's logits on the second half of the samples."""
    half = len(ids) // 2
    small = dict(prune(model, target, ids[:half], METHODS["default"], 0))
    expected, found = (
        token_logits(decoder, weights, ids[half:]).log_softmax(-1)
        for decoder, weights in ((model.decoder, weight_stream(model)), (target, small.items()))
    )
    return float((expected.exp() * (expected - found)).sum(-1).mean())


def test_the_response_is_the_measured_divergence_over_the_predicted_loss():
    settings = {"hidden_size": 96, "intermediate_size": 96, "num_attention_heads": 6, "head_dim": 16}
    model = as_model(llama(num_hidden_layers=7, **settings))
    ids = torch.randint(0, 101, (8, 20), generator=torch.Generator().manual_seed(0))
    raw = measure_sensitivities(model, ids, numerical, 0, FORMATS)
    calls = []
    found = measure_response(model, ids, raw, METHODS["default"], 0, FORMATS, on_probe=lambda: calls.append(1))
    assert len(calls) == probes_of(FORMATS, ()) == 3
    # Widths: the prediction of the probe is what it was measured to lose.
    widths = [Widths(2, 3, 96), *probe_widths(Widths(2, 3, 96), 6)]
    expected = divergence(model, model.decoder.with_layer_widths(widths), ids)
    assert np.isclose(found.loss(widths), expected, rtol=1e-3)
    # Formats: the same, by a factor that all formats share.
    form = WEIGHT_FORMATS["int4-32"]
    pairs = [(None, None)] + [(form, form)] * 6
    predicted = raw.rounding_loss([Widths(2, 3, 96)] * 7, pairs)
    factors = {losses.response for losses in found.roundings.values()}
    assert len(factors) == 1
    assert np.isclose(
        factors.pop(), divergence(model, model.decoder.with_formats(pairs, None, None), ids) / predicted, rtol=1e-3
    )


def test_the_response_of_a_cache_is_measured_on_the_last_layers():
    """Predictions of the layers before take the same factor; the scales are those of the samples of the probe."""
    settings = {"hidden_size": 96, "intermediate_size": 96, "num_attention_heads": 6, "head_dim": 16}
    model = as_model(llama(num_hidden_layers=7, **settings))
    ids = torch.randint(0, 101, (8, 20), generator=torch.Generator().manual_seed(0))
    form = CACHE_FORMATS["int8"]
    raw = measure_sensitivities(model, ids, numerical, 0, caches=(form,))
    calls = []
    found = measure_response(
        model, ids, raw, METHODS["default"], 0, caches=(form,), on_probe=lambda: calls.append(1)
    ).caches["int8"]
    assert len(calls) == probes_of((), (form,)) == 3
    rounded = with_cache(model, form, cache_scales(model, ids[:4], form))
    weights = dict(weight_stream(rounded))
    whole = rounded.decoder.layers[0]
    first = replace(whole, attention=replace(whole.attention, cache_format=None))  # it is not probed
    decoder = replace(rounded.decoder, layers=(first, *rounded.decoder.layers[1:]))
    expected, small = (
        token_logits(d, ((name, weights[name]) for name in d.shapes()), ids[4:]).log_softmax(-1)
        for d in (model.decoder, decoder)
    )
    measured = float((expected.exp() * (expected - small)).sum(-1).mean())
    assert np.isclose(found.response, measured / raw.caches["int8"].attention[1:].sum(), rtol=0.02)
    assert np.allclose(found.by_layer, found.response * raw.caches["int8"].attention)


def test_probes_cut_another_kind_in_each_layer():
    assert probe_widths(Widths(4, 3, 64), 4) == [Widths(3, 3, 64), Widths(4, 2, 64), Widths(4, 3, 48), Widths(3, 3, 64)]
    assert probe_widths(Widths(1, 1, 64), 2) == [Widths(1, 1, 48)] * 2


def test_probes_change_the_last_fifth_of_the_layers():
    assert list(probed_layers(30)) == [24, 25, 26, 27, 28, 29]
    assert list(probed_layers(9)) == [3, 4, 5, 6, 7, 8]


def test_the_coarsest_format_is_probed():
    names = ("int8", "int4-32", "int4-128", "int4-32-asymmetric")
    assert coarsest(tuple(WEIGHT_FORMATS[name] for name in names)).name == "int4-128"
    assert coarsest((WEIGHT_FORMATS["int8"],)).name == "int8"
    for names, first in (
        (("q5_k", "q3_k", "q4_0"), "q3_k"),
        (("q5_0", "q4_1", "q5_1"), "q4_1"),
        (("q4_k", "q4_0"), "q4_0"),
    ):
        assert coarsest(tuple(WEIGHT_FORMATS[name] for name in names)).name == first
