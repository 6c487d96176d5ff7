"""Probes: the inputs of output projections as transformers computes them, whatever else is in the batch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from edgeprune.model.decoder import Experts
from edgeprune.pruning.probes import layers_visited, probes_of, visit_inputs
from tests.support.tiny import as_model, llama

LENGTHS = (7, 40, 12, 64, 3)


@pytest.fixture(scope="module")
def reference():
    return llama(num_hidden_layers=4)


@pytest.fixture(scope="module")
def documents():
    generator = np.random.default_rng(0)
    return [generator.integers(101, size=length) for length in LENGTHS]


def test_the_inputs_are_those_of_transformers_weighed_by_the_stream(reference, documents, monkeypatch):
    monkeypatch.setattr("edgeprune.pruning.probes.CHUNK_TOKENS", 90)  # several batches
    seen = {}
    visit_inputs(
        as_model(reference), documents, lambda p, w, n, x: seen.setdefault((p.layer, p.kind), []).append((n, w, x))
    )
    assert sorted({layer for layer, _ in seen}) == [0, 1, 2]
    for number, ids in enumerate(documents):
        expected = _expected(reference, ids)
        for (index, kind), visits in seen.items():
            assert [n for n, _, _ in visits] == list(range(len(documents)))
            _, weight, inputs = visits[number]
            torch.testing.assert_close(inputs, expected[index, kind], rtol=1e-3, atol=1e-5)
            layer = reference.model.layers[index]
            module = layer.self_attn.o_proj if kind == "attention" else layer.mlp.down_proj
            assert torch.equal(weight, module.weight)


def _expected(reference, ids):
    """By layer and kind, what the output projections read, over the length of the stream behind them."""
    read, stream, handles = {}, {}, []

    def keep(kept, key, module):
        handles.append(module.register_forward_pre_hook(lambda _, args: kept.update({key: args[0][0]})))

    for index, layer in enumerate(reference.model.layers):
        keep(read, (index, "attention"), layer.self_attn.o_proj)
        keep(stream, (index, "attention"), layer.post_attention_layernorm)
        keep(read, (index, "mlp"), layer.mlp.down_proj)
        if index:
            keep(stream, (index - 1, "mlp"), layer.input_layernorm)
    with torch.inference_mode():
        reference(torch.from_numpy(ids)[None])
    for handle in handles:
        handle.remove()
    return {key: read[key] / stream[key].norm(dim=-1, keepdim=True) for key in stream}


def test_probes_stand_within_the_depth_and_experts_have_none():
    decoder = as_model(llama(num_hidden_layers=8)).decoder
    assert sorted({probe.layer for probe in probes_of(decoder)}) == [1, 3, 5]
    assert layers_visited(decoder) == 6
    experts = Experts(4, 2, normalised=True)
    layers = tuple(replace(layer, mlp=replace(layer.mlp, experts=experts)) for layer in decoder.layers)
    assert {probe.kind for probe in probes_of(replace(decoder, layers=layers))} == {"attention"}
