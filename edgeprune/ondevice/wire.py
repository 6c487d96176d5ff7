"""Performances as JSON values and back: what journals hold and what travels to and from a device."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from edgeprune.ondevice.figures import Built, Estimate, Figure, Measured, Memory, Performance

_KINDS = {kind.source: kind for kind in (Measured, Built, Estimate)}


def figure_to_json(figure: Figure) -> dict[str, Any]:
    return {"source": figure.source, **asdict(figure)}


def figure_from_json(value: dict[str, Any]) -> Figure:
    arguments = dict(value)
    return _KINDS[arguments.pop("source")](**arguments)


def performance_to_json(performance: Performance) -> dict[str, Any]:
    """Every figure keeps its source; absent ratios are None."""
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
    ratios = {
        name: None if value[name] is None else figure_from_json(value[name])
        for name in ("prefill_ratio", "decode_ratio")
    }
    return Performance(
        memory=Memory(
            **{name: figure_from_json(part) for name, part in value["memory"].items()},
        ),
        prefill=figure_from_json(value["prefill"]),
        decode=figure_from_json(value["decode"]),
        **ratios,
        percentiles=value["percentiles"],
        notes=tuple(value["notes"]),
        conditions=value["conditions"],
    )
