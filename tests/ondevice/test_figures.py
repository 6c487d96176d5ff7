"""Figures and performances as JSON and back; the sums of a memory's parts."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.ondevice.figures import (
    Built,
    Estimate,
    Measured,
    Memory,
    Performance,
    figure_from_json,
    figure_to_json,
    performance_from_json,
    performance_to_json,
)

NUMBERS, WORDS = st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=12)
MEASURED = st.builds(Measured, NUMBERS, WORDS, WORDS, NUMBERS, NUMBERS)
FIGURES = MEASURED | st.builds(Built, NUMBERS, WORDS, WORDS, WORDS) | st.builds(Estimate, NUMBERS, WORDS, WORDS, WORDS)
PERFORMANCES = st.builds(
    Performance,
    memory=st.builds(Memory, FIGURES, FIGURES, FIGURES, FIGURES, FIGURES),
    prefill=FIGURES,
    decode=FIGURES,
    prefill_ratio=st.none() | MEASURED,
    decode_ratio=st.none() | MEASURED,
    percentiles=st.dictionaries(WORDS, st.dictionaries(WORDS, NUMBERS, max_size=2), max_size=2),
    notes=st.lists(WORDS, max_size=2).map(tuple),
    conditions=st.dictionaries(WORDS, WORDS, max_size=2),
)


def through_json(document: dict) -> dict:
    return json.loads(json.dumps(document, allow_nan=False))


@given(FIGURES)
def test_a_figure_comes_back_as_it_was_and_of_its_own_kind(figure):
    document = through_json(figure_to_json(figure))
    assert set(document) == {"source", "value", "unit", "device", "low", "high", "basis"}
    assert (document["basis"] is None) == (document["source"] == "measured") == (document["low"] is not None)
    again = figure_from_json(document)
    assert again == figure
    assert type(again) is type(figure)


@given(PERFORMANCES)
def test_a_performance_comes_back_as_it_was(performance):
    assert performance_from_json(through_json(performance_to_json(performance))) == performance


def test_a_source_that_does_not_exist_is_no_figure():
    document = figure_to_json(Estimate(1.0, "ms", "l4", "bytes / bandwidth"))
    with pytest.raises(KeyError, match="guessed"):
        figure_from_json(document | {"source": "guessed"})


def test_what_pruning_can_change_is_all_but_the_runtime():
    parts = [Estimate(value, "bytes", "l4", "") for value in (100.0, 20.0, 3.0, 0.5, 4000.0)]
    memory = Memory(*parts)
    assert (memory.total, memory.prunable) == (4123.5, 123.5)
    assert list(memory.parts) == ["weights", "cache", "activations", "buffers", "runtime"]
    latency = Measured(2.0, "ms", "l4", 1.0, 3.0)
    assert Performance(memory, latency, Measured(5.0, "ms", "l4", 4.0, 6.0)).values == {
        "memory": 4123.5,
        "prefill": 2.0,
        "decode": 5.0,
    }
