"""What a user notices, as it stands in the report."""

from __future__ import annotations

from edgeprune.ondevice.experience import Room, experience_of
from edgeprune.ondevice.figures import Estimate, Memory, Performance, Workload
from edgeprune.report.experience import experience_part


def test_an_experience_as_it_stands_in_the_report():
    parts = [Estimate(1e6, "bytes", "board", "bytes")] * 5
    latency = Estimate(100.0, "ms", "board", "bytes / bandwidth")
    room = Room(8e6, "the memory budget", 4096, 100.0, 1e6)
    workload = Workload(1, 8, 16)
    found = experience_part(experience_of(Performance(Memory(*parts), latency, latency), workload, room, 900, 3))
    assert (found.tokens_per_second.value, found.tokens_per_second.source) == (10.0, "estimated")
    assert (found.longest_context.value, found.longest_context.unit) == (900, "tokens")
    assert (found.sequences.value, found.sequences.unit) == (3, "sequences")
    assert found.room.model_dump() == room.__dict__
