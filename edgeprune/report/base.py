"""The parts that every document is made of: strict models, and numbers with their unit and source.

It does not know which documents there are.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from edgeprune.ondevice.figures import Figure as EngineFigure
from edgeprune.ondevice.figures import figure_to_json

Source = Literal["measured", "built", "estimated"]


class Strict(BaseModel):
    """A part of a document: it is frozen, and an unknown field is an error."""

    # A broken model's perplexity can be infinite; as null the report could not be read back.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings", protected_namespaces=())


def keyed(*names: str) -> AfterValidator:
    """Returns a check that a dict has these keys and no others."""

    def check(content: dict[str, Any]) -> dict[str, Any]:
        if set(content) != set(names):
            raise ValueError(f"must hold {', '.join(names)}")
        return content

    return AfterValidator(check)


class Figure(Strict):
    """A number with its unit and where it comes from."""

    value: float
    unit: str = Field(description="bytes, ms, s, tokens/s, tokens, sequences, nats, %, points, or 1 for a ratio")
    source: Source = Field(
        description="measured: ran on `device`; built: the compiler's figure for a real engine; estimated: a model's"
    )
    device: str
    low: float | None = Field(None, description="lower bound of the 95 % interval; measured figures only")
    high: float | None = Field(None, description="upper bound of the 95 % interval; measured figures only")
    basis: str | None = Field(None, description="what a built or estimated figure rests on")


def figure_of(figure: EngineFigure) -> Figure:
    """Returns the report's form of a figure of an engine."""
    return Figure(**figure_to_json(figure))
