"""The figures that a user of a model notices: its speed against a reader's, the longest context, the most sequences.

Pure: it measures nothing. The memory of another context or number of sequences is that obtained for the workload plus
the difference between the estimates of the two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from edgeprune.engine.estimate import estimate_memory
from edgeprune.model.decoder import Decoder
from edgeprune.ondevice.budget import AbsoluteBudget
from edgeprune.ondevice.experience import MOST_SEQUENCES, Experience, Room, experience_of
from edgeprune.ondevice.figures import Performance, Workload
from edgeprune.precision import GraphPrecision
from edgeprune.profiles import DeviceProfile


def experience(
    decoder: Decoder,
    profile: DeviceProfile,
    workload: Workload,
    precision: GraphPrecision,
    performance: Performance,
    budget: AbsoluteBudget,
    images: int | None = None,
) -> Experience:
    """Returns speed, longest context and most sequences of a model within the memory budget, or else the device's.

    performance: obtained for the workload; images: drawn at once, of an image generator. Raises InputError for a
    profile without hardware figures.
    """
    # The limit, and the memory of the workload: obtained and estimated.
    limit, reason = profile.available_bytes, f"what the system leaves on {profile.name}"
    if budget.memory is not None:
        limit, reason = budget.memory, "the memory budget"
    obtained, estimated = performance.memory.total, estimate_memory(decoder, profile, workload, precision).total

    def needs(changed: Workload) -> float:
        """Returns the bytes that another workload needs."""
        return obtained + estimate_memory(decoder, profile, changed, precision).total - estimated

    def with_context(context: int) -> float:
        return needs(replace(workload, context=context, prompt=min(workload.prompt, context - 1)))

    def with_sequences(batch: int) -> float:
        return needs(replace(workload, batch=batch))

    # The largest numbers within the limit, and the bytes of one more of each.
    most = decoder.max_position_embeddings
    context = _largest(with_context, limit, 2, most)
    sequences = _largest(with_sequences, limit, 1, MOST_SEQUENCES)
    room = Room(
        limit,
        reason,
        most,
        _growth(with_context, workload.context, context or 2),
        _growth(with_sequences, workload.batch, sequences or 1),
    )
    return experience_of(performance, workload, room, context, sequences, images)


def _largest(needs: Callable[[int], float], limit: float, first: int, last: int) -> int:
    """Returns the largest number from first to last whose needs, which rise with it, are within the limit; 0: none."""
    if needs(first) > limit:
        return 0
    low, high = first, first + 1
    while high <= last and needs(high) <= limit:
        low, high = high, 2 * high
    high = min(high, last + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if needs(middle) <= limit else (low, middle)
    return low


def _growth(needs: Callable[[int], float], start: int, end: int) -> float:
    """Returns the bytes that one more needs, on average between two numbers."""
    if start == end:
        end += 1
    return (needs(end) - needs(start)) / (end - start)
