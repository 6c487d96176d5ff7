"""The part of report.json about what a user of the model will notice. It does not know how that is computed."""

from __future__ import annotations

from math import isfinite

from pydantic import Field, model_validator

from edgeprune.ondevice import experience
from edgeprune.ondevice.experience import TOKENS_PER_WORD, WORDS_PER_MINUTE
from edgeprune.report.base import Figure, Strict, figure_of


class Room(Strict):
    """Memory for more context or more sequences than the workload's."""

    limit: float = Field(description="bytes that may be used")
    reason: str = Field(description="what sets the limit: the memory budget, or else the device")
    most_context: int = Field(description="the model's positions")
    context_bytes: float = Field(ge=0, description="estimated, of one more token of context, of all sequences together")
    sequence_bytes: float = Field(
        ge=0, description="estimated, of one more sequence at the workload's prompt and context"
    )


class Experience(Strict):
    """The figures that a user of the model will notice."""

    first_token: Figure = Field(description="ms until the answer to `workload.prompt` tokens begins: the prefill")
    tokens_per_second: Figure = Field(description="of each sequence, at full context")
    reading_speed: Figure | None = Field(
        description="none: an image generator; how many times the rate of a reader that is: of "
        f"{WORDS_PER_MINUTE} words per minute (Brysbaert 2019, silent reading of English) at {TOKENS_PER_WORD} tokens "
        "per word"
    )
    seconds_per_image: Figure | None = Field(
        None,
        description="of an image generator: the time that all codes of a batch take over its pictures; the codec apart",
    )
    longest_context: Figure = Field(description="tokens that memory has room for; 0: not even the smallest context")
    sequences: Figure = Field(
        description="at once, that memory has room for at the workload's prompt and context; 0: not even one"
    )
    room: Room

    @model_validator(mode="after")
    def _counts_are_finite(self) -> Experience:
        """Raises ValueError for a number of tokens or sequences that cannot be counted."""
        if not (isfinite(self.longest_context.value) and isfinite(self.sequences.value)):
            raise ValueError("longest_context and sequences must be finite")
        return self


def experience_part(noticed: experience.Experience) -> Experience:
    """Returns the report's form of what a user notices."""
    figures = {name: figure and figure_of(figure) for name, figure in noticed.figures.items()}
    return Experience(room=Room(**noticed.room.__dict__), **figures)
