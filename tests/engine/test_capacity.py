"""Speed against a reader's; room for context and sequences against a walk over all of them, one by one."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.engine.capacity import experience
from edgeprune.engine.estimate import estimate_memory, estimate_performance
from edgeprune.ondevice.budget import AbsoluteBudget
from edgeprune.ondevice.experience import experience_again
from edgeprune.ondevice.figures import Built, Estimate, Measured, Memory, Performance, Workload
from edgeprune.profiles import load_profile
from tests.support.shapes import SMOLLM2

ORIN = load_profile("jetson-orin")
PROFILES = {
    dialect: ORIN.model_copy(update={"dialect": dialect}) for dialect in ("opset23", "primitive", "onnxruntime")
}
WORKLOAD = Workload(2, 64, 256)
SMALL = replace(SMOLLM2, max_position_embeddings=600)


def obtained(total: float, decode: float = 20.0) -> Performance:
    """Measured on a device: a total that no estimate gives."""
    parts = (total - 4.0, 1.0, 1.0, 1.0, 1.0)
    return Performance(
        Memory(*(Measured(part, "bytes", "board", part, part) for part in parts)),
        prefill=Measured(90.0, "ms", "board", 85.0, 99.0),
        decode=Measured(decode, "ms", "board", 0.9 * decode, 1.25 * decode),
    )


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


def brute_force(profile, total: float, limit: float) -> tuple[int, int]:
    def needs(workload: Workload) -> float:
        estimates = (estimate_memory(SMALL, profile, of, "fp16").total for of in (workload, WORKLOAD))
        return total + next(estimates) - next(estimates)

    context = sequences = 0
    while context < 600 and needs(Workload(2, min(64, max(2, context + 1) - 1), max(2, context + 1))) <= limit:
        context = max(2, context + 1)
    while needs(Workload(sequences + 1, 64, 256)) <= limit:
        sequences += 1
    return context, sequences


@pytest.mark.parametrize("dialect", PROFILES)
@pytest.mark.parametrize("spare", [-90e6, -20e6, -1.0, 0.0, 3e6, 10e6, 40e6])
def test_room_is_what_a_walk_over_all_contexts_and_batches_finds(dialect, spare):
    total, profile = 777e6, PROFILES[dialect]
    found = experience(SMALL, profile, WORKLOAD, "fp16", obtained(total), AbsoluteBudget(memory=total + spare))
    assert (found.longest_context.value, found.sequences.value) == brute_force(profile, total, total + spare)
    assert {found.longest_context.source, found.sequences.source} == {"estimated"}
    assert "741.0 MiB at batch 2, context 256" in found.sequences.basis
    assert "the memory budget" in found.sequences.basis


def test_the_models_positions_end_the_context():
    found = experience(SMALL, ORIN, WORKLOAD, "fp16", obtained(777e6), AbsoluteBudget())
    assert found.longest_context.value == 600
    assert found.longest_context.basis == "all positions that the model has"
    assert found.room.limit == ORIN.available_bytes
    assert "what the system leaves on jetson-orin" in found.sequences.basis


def test_one_more_token_of_context_costs_its_cache_its_ids_and_its_column_of_the_mask():
    """Keys and values of 30 layers x 3 heads x 64 in fp16, past and present; int64 ids; the mask for every prompt."""
    limit = AbsoluteBudget(memory=800e6)
    found = experience(SMALL, PROFILES["opset23"], Workload(1, 64, 256), "fp16", obtained(777e6), limit)
    assert found.room.context_bytes == pytest.approx(2 * 2 * 2 * 30 * 3 * 64 + 8 + 2 * 64)


def test_a_fitted_model_has_more_room_in_the_same_memory():
    pruned = SMOLLM2.with_widths(2, 3, 1024)
    limit = AbsoluteBudget(memory=estimate_memory(SMOLLM2, ORIN, WORKLOAD, "fp16").total)
    dense, fitted = (
        experience(of, ORIN, WORKLOAD, "fp16", estimate_performance(of, ORIN, WORKLOAD, "fp16"), limit)
        for of in (SMOLLM2, pruned)
    )
    assert (dense.longest_context.value, dense.sequences.value) == (256, 2)
    assert fitted.longest_context.value > 1000
    assert fitted.sequences.value > 4


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(PROFILES)), st.floats(-60e6, 200e6))
def test_the_device_finds_the_same_room_from_what_was_found_before(dialect, spare):
    """And with more memory used, less of it."""
    total, workload = 777e6, Workload(1, 64, 256)
    budget = AbsoluteBudget(memory=total + spare)
    before = experience(SMOLLM2, PROFILES[dialect], workload, "fp16", obtained(total), budget)
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
