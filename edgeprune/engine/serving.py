"""What a user notices of a running model, from its figures: how fast it answers, for how much memory has room.

This file also runs on the device: Python 3.10, standard library only; it sees no model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from edgeprune.engine.base import Estimate, Figure, Measured, Performance, Workload

WORDS_PER_MINUTE = 238  # silent reading of English non-fiction: Brysbaert 2019, a meta-analysis of 190 studies
TOKENS_PER_WORD = 1.33  # of English text in the vocabularies of today's models
READING_RATE = WORDS_PER_MINUTE * TOKENS_PER_WORD / 60  # tokens/s


@dataclass(frozen=True)
class Room:
    """Memory beyond what was obtained. limit: bytes that may be used; reason: what sets it.

    most_context: the model's positions. context_bytes, sequence_bytes: what one more token of context, for all
    sequences, and one more sequence cost on the way from the workload to the limit.
    """

    limit: float
    reason: str
    most_context: int
    context_bytes: float
    sequence_bytes: float


@dataclass(frozen=True)
class Experience:
    """first_token in ms; tokens_per_second of one sequence; reading_speed: how many times a reader's rate that is;
    longest_context in tokens and sequences at once, by memory alone, 0 where there is not room for one."""

    first_token: Figure
    tokens_per_second: Figure
    reading_speed: Figure
    longest_context: Estimate
    sequences: Estimate
    room: Room

    @property
    def figures(self) -> dict[str, Figure]:
        return {name: value for name, value in self.__dict__.items() if name != "room"}


def experience_of(
    performance: Performance, workload: Workload, room: Room, longest_context: int, sequences: int
) -> Experience:
    rate = _turned(performance.decode, 1e3, "tokens/s")
    base = f"{performance.memory.total / 2**20:.1f} MiB at batch {workload.batch}, context {workload.context}"
    limited = f"{base}, and what more would cost, within {room.limit / 2**20:.1f} MiB: {room.reason}"

    def estimate(value: int, unit: str, basis: str) -> Estimate:
        return Estimate(float(value), unit, performance.memory.weights.device, basis)

    return Experience(
        first_token=performance.prefill, tokens_per_second=rate,
        reading_speed=_scaled(rate, 1 / READING_RATE, "1"),
        longest_context=estimate(
            longest_context, "tokens",
            "all positions that the model has" if longest_context == room.most_context else limited,
        ),
        sequences=estimate(sequences, "sequences", limited), room=room,
    )  # fmt: skip


def experience_again(performance: Performance, workload: Workload, room: Room) -> Experience:
    """The same for other figures of the same model, such as those of its device: room as it was found before."""
    spare = room.limit - performance.memory.total
    context = workload.context + spare // room.context_bytes
    sequences = workload.batch + spare // room.sequence_bytes
    context = min(room.most_context, context) if context > 1 else 0
    return experience_of(performance, workload, room, int(context), max(0, int(sequences)))


def _turned(figure: Figure, numerator: float, unit: str) -> Figure:
    """numerator / figure; the interval's bounds change places."""
    value = numerator / figure.value
    if isinstance(figure, Measured):
        return replace(figure, value=value, unit=unit, low=numerator / figure.high, high=numerator / figure.low)
    return replace(figure, value=value, unit=unit, basis=f"1 / decode; {figure.basis}")


def _scaled(figure: Figure, factor: float, unit: str) -> Figure:
    if isinstance(figure, Measured):
        low, high = factor * figure.low, factor * figure.high
        return replace(figure, value=factor * figure.value, unit=unit, low=low, high=high)
    return replace(figure, value=factor * figure.value, unit=unit)
