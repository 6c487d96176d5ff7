"""The cost of widths and weight formats by the estimator's formulas, against its estimates of whole models."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.engine.estimate import estimate_performance
from edgeprune.engine.overheads import fixed_times
from edgeprune.model.decoder import Attention, Decoder, Grid, Layer, Mlp, Picture, Rotary
from edgeprune.ondevice.figures import Workload
from edgeprune.precision import CACHE_FORMATS, WEIGHT_FORMATS
from edgeprune.profiles import list_profiles, load_profile
from edgeprune.search.estimated_costs import estimated_costs, memory_costs
from edgeprune.search.latency_table import KINDS
from tests.support.shapes import SMOLLM2

ORIN = load_profile("jetson-orin")
WORKLOAD = Workload(1, 128, 512)
PROBED = [profile for profile in list_profiles() if profile.is_probed]

WIDTHS = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 24).map(lambda n: 64 * n))


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(widths=WIDTHS, depth=st.integers(1, 30), tokens=st.sampled_from([49152, 8192]), place=st.integers(0, 99))
def test_the_estimators_table_adds_up_to_the_estimate(
    widths: tuple[int, int, int], depth: int, tokens: int, place: int
) -> None:
    """Exactly for memory; for latencies where the same resource binds."""
    profile = PROBED[place % len(PROBED)]
    parts = (profile, WORKLOAD, profile.precision)
    decoder = replace(SMOLLM2.with_widths(*widths), layers=SMOLLM2.with_widths(*widths).layers[:depth])
    performance = estimate_performance(replace(decoder, vocab_size=tokens), *parts)
    layers = [widths] * depth + [(0, 1, 0)] * (30 - depth)
    memory = memory_costs(SMOLLM2, *parts).total(layers, tokens)
    assert memory == pytest.approx(performance.memory.total, rel=1e-9)
    latency = estimated_costs(SMOLLM2, *parts)
    dense = estimate_performance(SMOLLM2, *parts)
    for kind in KINDS:
        expected = getattr(performance, kind)
        if ("bound by" in expected.basis) == ("bound by" in getattr(dense, kind).basis):
            assert getattr(latency, kind).total(layers, tokens) == pytest.approx(expected.value, rel=1e-6)


def test_the_estimators_table_of_an_image_generator_adds_up() -> None:
    """From its class on, one token at a time, both streams of the guidance: what is only read costs memory alone."""
    layer = Layer(Attention(12, 12, 64, Rotary((1.0,) * 32, grid=Grid(1, 24))), Mlp(2048))
    decoder = Decoder("llamagen", 768, 16384, 577, 1e-5, False, (layer,) * 12, picture=Picture(24, 1000))
    for profile in PROBED[::4]:
        for batch in (1, 2):
            parts = (profile, Workload(batch, 1, 576), profile.precision)
            estimate, latency = estimate_performance(decoder, *parts), estimated_costs(decoder, *parts)
            memory = memory_costs(decoder, *parts).total(decoder.layer_widths, decoder.vocab_size)
            assert memory == pytest.approx(estimate.memory.total, rel=1e-9)
            text = estimate_performance(replace(decoder, picture=None), *parts)
            read = 1001 * 768 * (4 if profile.precision == "fp32" else 2)
            assert estimate.memory.total - text.memory.total == pytest.approx(read)
            for kind in KINDS:
                assert "bound by compute" not in getattr(estimate, kind).basis
                total = getattr(latency, kind).total(decoder.layer_widths, decoder.vocab_size)
                assert total == pytest.approx(getattr(estimate, kind).value, rel=1e-6)
                assert getattr(text, kind) == getattr(estimate, kind)
            fixed = fixed_times(profile)
            constant = fixed["prefill"] - fixed["decode"]
            assert estimate.prefill.value - constant < estimate.decode.value  # no cache is read yet


GONE = (0, 1, 0)
HEADS = st.tuples(st.integers(1, 3), st.integers(1, 3))
LAYER = st.tuples(st.booleans(), st.integers(0, 24).map(lambda n: 64 * n))  # whether attention stays, MLP channels


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(heads=HEADS, layers=st.lists(LAYER, min_size=30, max_size=30), place=st.integers(0, 99))
def test_the_estimators_table_adds_up_for_free_widths(
    heads: tuple[int, int], layers: list[tuple[bool, int]], place: int
) -> None:
    """Of one number of heads, as the search chooses them: memory exactly with its peak, latencies as above."""
    profile = PROBED[place % len(PROBED)]
    parts = (profile, WORKLOAD, profile.precision)
    widths = [(*(heads if stays else GONE[:2]), channels) for stays, channels in layers]
    decoder = SMOLLM2.with_layer_widths(widths)
    expected, dense = (estimate_performance(of, *parts) for of in (decoder, SMOLLM2))
    tokens = SMOLLM2.vocab_size
    memory = memory_costs(SMOLLM2, *parts).total(widths, tokens)
    assert memory == pytest.approx(expected.memory.total, rel=1e-9)
    latency = estimated_costs(SMOLLM2, *parts)
    for kind in KINDS:
        found, basis = getattr(latency, kind).total(widths, tokens), getattr(expected, kind).basis
        if ("bound by" in basis) == ("bound by" in getattr(dense, kind).basis):
            assert found == pytest.approx(getattr(expected, kind).value, rel=1e-6)
        else:
            assert found < getattr(expected, kind).value  # another resource binds, which the table does not see


def test_memory_of_free_widths_is_exact() -> None:
    layers = [(2, 3, 512)] * 10 + [(0, 1, 1024)] * 5 + [(2, 3, 0)] * 5 + [(0, 1, 0)] * 10
    parts = (ORIN, WORKLOAD, "fp16")
    expected = estimate_performance(SMOLLM2.with_layer_widths(layers), *parts).memory.total
    assert memory_costs(SMOLLM2, *parts).total(layers, SMOLLM2.vocab_size) == pytest.approx(expected, rel=1e-9)


def test_a_cache_in_codes_costs_what_its_own_dialect_does() -> None:
    """On an Orin a cache of floats is in place and one of codes is not: each table is of its own graph."""
    layers = [(2, 3, 512)] * 10 + [(0, 1, 1024)] * 5 + [(2, 3, 0)] * 5 + [(0, 1, 0)] * 10
    parts, int8 = (ORIN, Workload(2, 128, 2048), "fp16"), CACHE_FORMATS["int8"]
    latency = estimated_costs(SMOLLM2, *parts, caches=(None, int8))
    for cache in (None, int8):
        dense = SMOLLM2.with_cache(cache)
        expected = estimate_performance(dense.with_layer_widths(layers), *parts)
        assert ("both held" in expected.memory.cache.basis) == (cache is not None)
        memory = memory_costs(dense, *parts).total(layers, dense.vocab_size)
        assert memory == pytest.approx(expected.memory.total, rel=1e-9)
        for kind, costs in latency.of(cache).items():
            assert costs.total(layers, dense.vocab_size) == pytest.approx(getattr(expected, kind).value, rel=1e-6)


FORMATS = (None, WEIGHT_FORMATS["int8"], WEIGHT_FORMATS["int4-64"])


@pytest.mark.parametrize("tied", [True, False])
def test_memory_and_latencies_of_formats_add_up(tied: bool) -> None:
    dense = replace(SMOLLM2, tie_word_embeddings=tied)
    parts = (ORIN, WORKLOAD, "fp16")
    memory, latency = memory_costs(dense, *parts, FORMATS), estimated_costs(dense, *parts, FORMATS)
    layers = [(2, 3, 512)] * 10 + [(0, 1, 1024)] * 5 + [(2, 3, 0)] * 5 + [(0, 1, 0)] * 10
    places = [(place % 3, (place + 1) % 3) for place in range(30)]
    formats = [(FORMATS[a], FORMATS[m]) for a, m in places]
    for tables in ((0, 0), (1, 1)) if tied else ((0, 0), (0, 1), (2, 1)):
        decoder = dense.with_layer_widths(layers).with_formats(formats, *(FORMATS[place] for place in tables))
        expected, whole = estimate_performance(decoder, *parts), estimate_performance(dense, *parts)
        held = memory.total(layers, dense.vocab_size, places, tables)
        assert held == pytest.approx(expected.memory.total, rel=1e-9)
        for kind in KINDS:
            found = getattr(latency, kind).total(layers, dense.vocab_size, places, tables)
            if len({"bound by" in getattr(one, kind).basis for one in (expected, whole)}) == 1:
                assert found == pytest.approx(getattr(expected, kind).value, rel=1e-6)


def test_a_width_that_groups_do_not_divide_costs_infinity() -> None:
    memory = memory_costs(SMOLLM2, load_profile("cpu").model_copy(update=ORIN.hardware), WORKLOAD, "fp32", FORMATS)
    assert memory.mlp[2, 96] == np.inf  # a multiple of 32, not of 64
    assert np.isfinite(memory.mlp[1, 96])
    assert np.isfinite(memory.mlp[2, 128])
    assert (memory.attention[2, 1:] < memory.attention[1, 1:]).all()
    assert (memory.attention[1, 1:] < memory.attention[0, 1:]).all()
