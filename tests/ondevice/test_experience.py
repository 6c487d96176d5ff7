"""The experience of a performance: speed against a reader's, room found again from what was found before."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.engine.capacity import experience
from edgeprune.ondevice.budget import AbsoluteBudget
from edgeprune.ondevice.experience import Room, experience_again
from edgeprune.ondevice.figures import Built, Estimate, Workload
from tests.support.room import ORIN, PROFILES, SMALL, WORKLOAD, obtained
from tests.support.shapes import SMOLLM2


def test_speed_is_that_of_one_sequence_against_a_reader():
    """238 words a minute at 1.33 tokens a word are 5.276 tokens/s."""
    found = experience(SMALL, ORIN, WORKLOAD, "fp16", obtained(1e9), AbsoluteBudget())
    assert found.first_token == obtained(1e9).prefill
    rate = found.tokens_per_second
    assert (rate.value, rate.low, rate.high) == pytest.approx((50.0, 40.0, 1000 / 18))
    assert (rate.unit, rate.source, rate.device) == ("tokens/s", "measured", "board")
    assert found.reading_speed.value == pytest.approx(50 / (238 * 1.33 / 60))
    assert (found.reading_speed.low, found.reading_speed.high) == pytest.approx((7.582, 10.530), abs=1e-3)


@pytest.mark.parametrize("kind", [Built, Estimate])
def test_an_estimated_decode_gives_an_estimated_speed(kind):
    performance = replace(obtained(1e9), decode=kind(20.0, "ms", "board", "bytes / bandwidth"))
    found = experience(SMALL, ORIN, WORKLOAD, "fp16", performance, AbsoluteBudget())
    for figure in (found.tokens_per_second, found.reading_speed):
        assert isinstance(figure, kind)
        assert "bytes / bandwidth" in figure.basis


@pytest.mark.parametrize(("spare", "context", "sequences"), [(0.0, 8192, 2**20), (-1.0, 0, 0)])
def test_what_costs_nothing_has_room_up_to_the_most_where_the_model_itself_has(spare, context, sequences):
    room = Room(777e6 + spare, "the memory budget", 8192, 0.0, 0.0)
    found = experience_again(obtained(777e6), WORKLOAD, room)
    assert (found.longest_context.value, found.sequences.value) == (context, sequences)


@pytest.mark.parametrize("dialect", sorted(PROFILES))
def test_a_model_without_attention_has_room_on_its_device_too(dialect):
    bare = replace(SMALL, layers=tuple(replace(layer, attention=None) for layer in SMALL.layers))
    budget = AbsoluteBudget(memory=900e6)
    before = experience(bare, PROFILES[dialect], WORKLOAD, "fp16", obtained(777e6), budget)
    again = experience_again(obtained(777e6), WORKLOAD, before.room)
    assert before.longest_context.value == again.longest_context.value == SMALL.max_position_embeddings
    assert abs(again.sequences.value - before.sequences.value) <= 1


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(PROFILES)), st.floats(-60e6, 200e6))
def test_the_device_finds_the_same_room_from_what_was_found_before(dialect, spare):
    """And with more memory used, less of it."""
    total, workload = 777e6, Workload(1, 64, 256)
    budget = AbsoluteBudget(memory=total + spare)
    before = experience(SMOLLM2, PROFILES[dialect], workload, "fp16", obtained(total), budget)
    assert min(before.room.context_bytes, before.room.sequence_bytes) > 0
    again = experience_again(obtained(total), workload, before.room)
    assert abs(again.longest_context.value - before.longest_context.value) <= 1
    assert abs(again.sequences.value - before.sequences.value) <= 1
    assert again.reading_speed == before.reading_speed
    tighter = experience_again(obtained(total + 50e6, 40.0), workload, before.room)
    assert tighter.longest_context.value <= again.longest_context.value
    assert tighter.reading_speed.value == pytest.approx(again.reading_speed.value / 2)
    shift = math.floor(50e6 / before.room.context_bytes)
    if 50 + shift < again.longest_context.value < 8192:
        assert abs(again.longest_context.value - tighter.longest_context.value - shift) <= 1
