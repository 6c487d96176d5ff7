"""The scales of a KV cache in codes, against the keys and values that transformers' cache is given."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from edgeprune.model import attention
from edgeprune.model.attention import through_cache
from edgeprune.model.cache import cache_scales, read_scales, with_cache, write_scales
from edgeprune.model.forward import token_logits, weight_stream
from edgeprune.model.quantised import QuantisedWeight
from edgeprune.precision import CACHE_FORMATS, CacheFormat
from tests.support.graph_models import Sample, llama
from tests.support.rounded_cache import RoundedCache, cached_logits, largest
from tests.support.roundings import W8A8, numbers, rounded
from tests.support.tiny import as_model

INT8, FP8 = CACHE_FORMATS["int8"], CACHE_FORMATS["fp8"]


@pytest.fixture(scope="module")
def whole() -> Sample:
    ids = np.random.default_rng(0).integers(0, 200, (3, 24))
    return Sample(ids, np.ones_like(ids), np.arange(24)[None].repeat(3, 0))


@pytest.mark.parametrize("form", [INT8, FP8], ids=lambda form: form.name)
def test_the_largest_of_each_channel_gets_the_largest_code(form, whole: Sample) -> None:
    model = as_model(llama(True))
    calls: list[int] = []
    found = cache_scales(model, torch.from_numpy(whole.ids), form, lambda: calls.append(1))
    expected = largest(llama(True), whole)
    assert len(calls) == len(expected) == len(model.decoder.layers)
    assert len(found) == 2 * len(expected)
    for index, pair in enumerate(expected):
        for part, largest_part in zip(("key", "value"), pair, strict=True):
            scale = found[f"layers.{index}.attention.{part}_scale"].numpy()
            assert np.allclose(scale, largest_part / form.most, rtol=1e-4)


def test_the_walk_over_a_cache_in_int8_is_transformers_over_a_rounded_one(whole: Sample) -> None:
    reference, model = llama(True), as_model(llama(True))
    scales = cache_scales(model, torch.from_numpy(whole.ids), INT8)
    quantised = with_cache(model, INT8, scales)
    assert set(quantised.decoder.shapes()) - set(model.decoder.shapes()) == set(scales)
    names = [[f"layers.{index}.attention.{part}_scale" for part in ("key", "value")] for index in range(3)]
    cache = RoundedCache([tuple(scales[name].numpy() for name in pair) for pair in names])
    expected = cached_logits(reference, whole, cache)[:, :-1]
    found = token_logits(quantised.decoder, weight_stream(quantised), torch.from_numpy(whole.ids)).numpy()
    plain = token_logits(model.decoder, weight_stream(model), torch.from_numpy(whole.ids)).numpy()
    assert np.abs(found - expected).max() < 1e-3 * np.abs(expected).max()
    assert np.abs(plain - expected).max() > 1e-3 * np.abs(expected).max()


def test_scales_are_those_of_keys_of_rounded_activations(whole: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    """In w8a8 the projections read codes: the largest key or value that they make has the largest code, no other."""
    model, ids = as_model(llama(True)), torch.from_numpy(whole.ids)
    decoder = model.decoder.with_format(W8A8)
    stored = rounded(decoder, model.weights)
    codes = {name: weight for name, weight in stored.items() if isinstance(weight, QuantisedWeight)}
    model = replace(model, decoder=decoder, weights=numbers(stored), quantised=codes)
    joined = with_cache(model, INT8, cache_scales(model, ids[:, :-1], INT8))
    seen: list[torch.Tensor] = []

    def recorded(states: torch.Tensor, scale: torch.Tensor, form: CacheFormat) -> torch.Tensor:
        seen.append((states / scale).abs().amax(dim=(0, 2)))
        return through_cache(states, scale, form)

    monkeypatch.setattr(attention, "through_cache", recorded)
    token_logits(joined.decoder, weight_stream(joined), ids)
    assert all(torch.allclose(codes, torch.tensor(127.0)) for codes in seen[:2])  # of the first layer, before any cache


def test_codes_are_the_nearest_and_end_where_the_format_ends() -> None:
    states, scale = torch.tensor([[[[0.4, 0.6, 126.6, 500.0, -500.0]]]]), torch.ones(1, 1, 1, 5)
    assert through_cache(states, scale, INT8).flatten().tolist() == [0.0, 1.0, 127.0, 127.0, -128.0]
    # e4m3: four significant bits.
    assert through_cache(states, scale, FP8).flatten().tolist() == [0.40625, 0.625, 128.0, 448.0, -448.0]
    assert through_cache(states, scale / 100, INT8).flatten()[0] == pytest.approx(0.4)


def test_scales_are_read_as_they_were_written(whole: Sample, tmp_path: Path) -> None:
    scales = cache_scales(as_model(llama(True)), torch.from_numpy(whole.ids), INT8)
    write_scales(scales, tmp_path / "cache.safetensors")
    read = read_scales(tmp_path / "cache.safetensors")
    assert read.keys() == scales.keys()
    assert all(torch.equal(read[name], scale) for name, scale in scales.items())
