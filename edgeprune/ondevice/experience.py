"""The experience of a running model, from its figures: how fast it answers, and how much context has room.

This file also runs on the device: Python 3.10, standard library only. It knows no model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf

from edgeprune.ondevice.figures import Estimate, Figure, Measured, Performance, Workload

WORDS_PER_MINUTE = 238  # silent reading of English non-fiction: Brysbaert 2019, a meta-analysis of 190 studies
TOKENS_PER_WORD = 1.33  # of English text in the vocabularies of today's models
READING_RATE = WORDS_PER_MINUTE * TOKENS_PER_WORD / 60  # tokens/s
MOST_SEQUENCES = 2**20  # that are counted, whatever the memory


@dataclass(frozen=True)
class Room:
    """The memory that may be used, and the cost of using more of it.

    limit: in bytes; reason: what sets it. most_context: the positions that the model has, in tokens. context_bytes:
    the cost of one more token of context for all sequences, 0 of a model without attention; sequence_bytes: that of one
    more sequence; both on the way from the workload to the limit.
    """

    limit: float
    reason: str
    most_context: int
    context_bytes: float
    sequence_bytes: float


@dataclass(frozen=True)
class Experience:
    """The figures that a user notices.

    first_token: in ms. tokens_per_second: of one sequence. reading_speed: that rate relative to a reader's; None for
    image generators. seconds_per_image: of the codes alone; None for texts. longest_context: in tokens. sequences: at
    once. The last two are by memory alone, and 0 where there is not room for one.
    """

    first_token: Figure
    tokens_per_second: Figure
    reading_speed: Figure | None
    seconds_per_image: Figure | None
    longest_context: Estimate
    sequences: Estimate
    room: Room

    @property
    def figures(self) -> dict[str, Figure | None]:
        """All figures by name, without the room."""
        return {name: value for name, value in self.__dict__.items() if name != "room"}


def experience_of(
    performance: Performance,
    workload: Workload,
    room: Room,
    longest_context: int,
    sequences: int,
    images: int | None = None,
) -> Experience:
    """Returns the experience of a performance, given the longest context and the sequences that have room.

    images: those that an image generator makes at once, each of which fills the workload's context; None for texts.
    """
    # The estimates name the memory and the limit that they rest on.
    rate = _reciprocal(performance.decode, 1e3, "tokens/s")
    base = f"{performance.memory.total / 2**20:.1f} MiB at batch {workload.batch}, context {workload.context}"
    limited = f"{base}, and what more would cost, within {room.limit / 2**20:.1f} MiB: {room.reason}"

    def estimate(value: int, unit: str, basis: str) -> Estimate:
        return Estimate(float(value), unit, performance.memory.weights.device, basis)

    # Text has a reader's speed, an image generator a time for each image.
    return Experience(
        first_token=performance.prefill,
        tokens_per_second=rate,
        reading_speed=None if images else _scaled(rate, 1 / READING_RATE, "1"),
        seconds_per_image=_seconds_per_image(performance, workload, images) if images else None,
        longest_context=estimate(
            longest_context,
            "tokens",
            "all positions that the model has" if longest_context == room.most_context else limited,
        ),
        sequences=estimate(sequences, "sequences", limited),
        room=room,
    )


def experience_again(performance: Performance, workload: Workload, room: Room, images: int | None = None) -> Experience:
    """Returns the experience for other figures of the same model, such as its device's, with the room as it was.

    Context and sequences follow from the memory that is left below the room's limit.
    """
    spare = room.limit - performance.memory.total
    context = min(room.most_context, workload.context + _more(spare, room.context_bytes))
    sequences = min(MOST_SEQUENCES, workload.batch + _more(spare, room.sequence_bytes))
    context, sequences = int(context) if context > 1 else 0, max(0, int(sequences))
    return experience_of(performance, workload, room, context, sequences, images)


def _more(spare: float, each: float) -> float:
    """Returns how many more have room in spare bytes; below 0 bytes, how many must go.

    More of what costs nothing has room wherever the model itself has.
    """
    if each:
        return spare // each
    return inf if spare >= 0 else -MOST_SEQUENCES


def _seconds_per_image(performance: Performance, workload: Workload, images: int) -> Figure:
    """Returns the seconds of an image: the prefill and all further steps, each taken to be as slow as the last.

    That is somewhat more than it takes.
    """
    prefill, decode = performance.prefill, performance.decode
    steps = workload.context - 1

    def seconds(prefill_ms: float, decode_ms: float) -> float:
        return (prefill_ms + steps * decode_ms) / images / 1e3

    value = seconds(prefill.value, decode.value)
    if isinstance(prefill, Measured) and isinstance(decode, Measured):
        low, high = seconds(prefill.low, decode.low), seconds(prefill.high, decode.high)
        return Measured(value, "s", decode.device, low, high)
    basis = f"(prefill + {steps} decode steps, each as slow as the last) / {images} at once"
    return Estimate(value, "s", decode.device, basis)


def _reciprocal(figure: Figure, numerator: float, unit: str) -> Figure:
    """Returns numerator / figure; the bounds of an interval change places."""
    value = numerator / figure.value
    if isinstance(figure, Measured):
        return replace(figure, value=value, unit=unit, low=numerator / figure.high, high=numerator / figure.low)
    return replace(figure, value=value, unit=unit, basis=f"1 / decode; {figure.basis}")


def _scaled(figure: Figure, factor: float, unit: str) -> Figure:
    """Returns the figure times a factor, in another unit."""
    if isinstance(figure, Measured):
        low, high = factor * figure.low, factor * figure.high
        return replace(figure, value=factor * figure.value, unit=unit, low=low, high=high)
    return replace(figure, value=factor * figure.value, unit=unit)
