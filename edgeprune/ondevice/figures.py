"""The workload and the figures that all engines share; each figure carries its source.

This file also runs on the device: Python 3.10, standard library only. It knows no model.
An estimate and a measurement are different types, so that one can never pass for the other.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar


@dataclass(frozen=True)
class Workload:
    """The work that is measured: prefill of `prompt` tokens, and one decode step at past = context - 1.

    batch: sequences at once. prompt, context: in tokens.
    """

    batch: int
    prompt: int
    context: int


@dataclass(frozen=True)
class Measured:
    """A figure that was measured on `device`; low and high bound the 95 % confidence interval of `value`."""

    value: float
    unit: str
    device: str
    low: float
    high: float
    source: ClassVar[str] = "measured"


@dataclass(frozen=True)
class Built:
    """The compiler's figure for a real engine that was built for `device`."""

    value: float
    unit: str
    device: str
    basis: str
    source: ClassVar[str] = "built"


@dataclass(frozen=True)
class Estimate:
    """A figure that a model of the device predicts; `basis` names the points that it rests on."""

    value: float
    unit: str
    device: str
    basis: str
    source: ClassVar[str] = "estimated"


Figure = Measured | Built | Estimate


@dataclass(frozen=True)
class Memory:
    """The peak memory on the device at full context, by part, in bytes."""

    weights: Figure
    cache: Figure  # the KV cache; past and present both, where the engine does not update in place
    activations: Figure  # activations and scratch at the workload's maximum shapes
    buffers: Figure  # inputs and outputs other than the cache
    runtime: Figure  # the runtime's fixed part, which no pruning changes

    @property
    def parts(self) -> dict[str, Figure]:
        """The figures of all parts, by name."""
        return dict(self.__dict__)

    @property
    def total(self) -> float:
        """The bytes of all parts together."""
        return sum(figure.value for figure in self.parts.values())

    @property
    def prunable(self) -> float:
        """The bytes of all but the runtime's fixed part, to which a relative budget refers."""
        return self.total - self.runtime.value


@dataclass(frozen=True)
class Performance:
    """The memory and latencies of one model on one device. Latencies are in ms; their `value` is the p50, or
    where there is a ratio the dense model's p50 times the ratio.

    The ratios are to the dense model, interleaved in the same run; they are absent for the dense model itself and
    where the latency is an estimate. percentiles: {"decode": {"p50": ..., "p90": ..., "p99": ...}} in ms.
    """

    memory: Memory
    prefill: Figure
    decode: Figure
    prefill_ratio: Measured | None = None
    decode_ratio: Measured | None = None
    percentiles: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    conditions: dict[str, str] = field(
        default_factory=dict
    )  # power mode, clocks and temperatures during the measurement

    @property
    def values(self) -> dict[str, float]:
        """The values that a budget can limit: memory in bytes, prefill and decode in ms."""
        return {"memory": self.memory.total, "prefill": self.prefill.value, "decode": self.decode.value}


_KINDS = {kind.source: kind for kind in (Measured, Built, Estimate)}


def figure_to_json(figure: Figure) -> dict[str, Any]:
    """Returns a figure as journals, devices and reports hold it; fields that its kind lacks are None."""
    return {"source": figure.source, "low": None, "high": None, "basis": None, **asdict(figure)}


def figure_from_json(value: dict[str, Any]) -> Figure:
    """Returns the figure of a document that figure_to_json made."""
    kind = _KINDS[value["source"]]
    return kind(**{field.name: value[field.name] for field in fields(kind)})


def performance_to_json(performance: Performance) -> dict[str, Any]:
    """Returns a performance as JSON: each figure with its source, absent ratios as None."""
    ratios = {
        name: None if (figure := getattr(performance, name)) is None else figure_to_json(figure)
        for name in ("prefill_ratio", "decode_ratio")
    }
    return {
        "memory": {name: figure_to_json(figure) for name, figure in performance.memory.parts.items()},
        "prefill": figure_to_json(performance.prefill),
        "decode": figure_to_json(performance.decode),
        **ratios,
        "percentiles": performance.percentiles,
        "notes": list(performance.notes),
        "conditions": performance.conditions,
    }


def performance_from_json(value: dict[str, Any]) -> Performance:
    """Returns the performance of a document that performance_to_json made."""
    ratios = {
        name: None if value[name] is None else figure_from_json(value[name])
        for name in ("prefill_ratio", "decode_ratio")
    }
    return Performance(
        memory=Memory(**{name: figure_from_json(part) for name, part in value["memory"].items()}),
        prefill=figure_from_json(value["prefill"]),
        decode=figure_from_json(value["decode"]),
        **ratios,
        percentiles=value["percentiles"],
        notes=tuple(value["notes"]),
        conditions=value["conditions"],
    )
