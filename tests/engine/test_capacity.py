"""Room for context and sequences, against a walk over all of them, one by one."""

from __future__ import annotations

import pytest

from edgeprune.engine.capacity import experience
from edgeprune.engine.estimate import estimate_memory, estimate_performance
from edgeprune.ondevice.budget import AbsoluteBudget
from edgeprune.ondevice.figures import Workload
from tests.support.room import ORIN, PROFILES, SMALL, WORKLOAD, obtained
from tests.support.shapes import SMOLLM2


def brute_force(profile, total: float, limit: float) -> tuple[int, int]:
    estimated = estimate_memory(SMALL, profile, WORKLOAD, "fp16").total

    def needs(workload: Workload) -> float:
        return total + estimate_memory(SMALL, profile, workload, "fp16").total - estimated

    context = sequences = 0
    while context < 600 and needs(Workload(2, min(64, max(2, context + 1) - 1), max(2, context + 1))) <= limit:
        context = max(2, context + 1)
    while needs(Workload(sequences + 1, 64, 256)) <= limit:
        sequences += 1
    return context, sequences


@pytest.mark.slow
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
