"""Budget: limits for memory, prefill and decode, absolute or relative to the dense model; and the verdict.

Sizes are understood as written: 1 GiB is 1024^3 bytes, 1 GB is 1000^3.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from edgeprune.engine.base import Figure, Measured, Performance
from edgeprune.errors import InputError

Status = Literal["met", "missed", "noisy"]
CONSTRAINTS = ("memory", "prefill", "decode")

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_NUMBER = re.compile(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([a-zA-Z%]*)\s*")


@dataclass(frozen=True)
class Limit:
    """asked: as the user wrote it. value: bytes or ms; where relative, a share of the dense model's."""

    asked: str
    value: float
    relative: bool


@dataclass(frozen=True)
class Budget:
    memory: Limit | None = None
    prefill: Limit | None = None
    decode: Limit | None = None
    max_quality_loss: float | None = None  # percent of held-out perplexity

    @property
    def limits(self) -> dict[str, Limit]:
        """The limits that were given, by constraint."""
        return {name: limit for name in CONSTRAINTS if (limit := getattr(self, name)) is not None}


@dataclass(frozen=True)
class Check:
    """One constraint against what was obtained; limit and figure in the constraint's unit."""

    name: str
    asked: str
    limit: float
    figure: Figure
    status: Status


def parse_size(text: str) -> float:
    """Bytes of `1.5GiB`, `900MB`, `2 GB`. Raises InputError."""
    number, unit = _split(text, "size", "1.5GiB, 900MB or 90%")
    if unit.upper() not in _UNITS:
        raise InputError(f"malformed size {text!r}: unknown unit {unit!r}", "Write it as 1.5GiB, 900MB or 90%.")
    return number * _UNITS[unit.upper()]


def parse_milliseconds(text: str) -> float:
    """Milliseconds of `25ms`, `0.5s`. Raises InputError."""
    number, unit = _split(text, "latency", "25ms, 0.5s or 70%")
    factor = {"ms": 1.0, "s": 1000.0}.get(unit)
    if factor is None:
        raise InputError(f"malformed latency {text!r}: unknown unit {unit!r}", "Write it as 25ms, 0.5s or 70%.")
    return number * factor


def _split(text: str, what: str, forms: str) -> tuple[float, str]:
    match = _NUMBER.fullmatch(text)
    if match is None:
        raise InputError(f"malformed {what} {text!r}", f"Write it as {forms}.")
    number = float(match[1])
    if not 0 < number < float("inf"):
        raise InputError(f"the {what} {text!r} is not a positive number", f"Write it as {forms}.")
    return number, match[2]


def parse_limit(constraint: str, text: str) -> Limit:
    """A limit for `memory`, `prefill` or `decode`, absolute or in percent. Raises InputError."""
    if text.strip().endswith("%"):
        number, _ = _split(text, f"{constraint} budget", "a percentage such as 70%")
        if number > 100:
            raise InputError(
                f"the {constraint} budget {text} is more than the dense model", "A relative budget is at most 100%."
            )
        return Limit(text.strip(), number / 100, relative=True)
    parse = parse_size if constraint == "memory" else parse_milliseconds
    return Limit(text.strip(), parse(text), relative=False)


def parse_budget(
    memory: str | None, prefill: str | None, decode: str | None, max_quality_loss: float | None = None
) -> Budget:
    """The budget of the given texts. Raises InputError for malformed or senseless ones."""
    if max_quality_loss is not None and not 0 <= max_quality_loss < float("inf"):
        raise InputError(
            f"the quality limit {max_quality_loss} is not a percentage",
            "--max-quality-loss takes the acceptable rise of perplexity in percent, such as 10.",
        )
    given = {"memory": memory, "prefill": prefill, "decode": decode}
    limits = {name: parse_limit(name, text) for name, text in given.items() if text is not None}
    return Budget(**limits, max_quality_loss=max_quality_loss)


def figures(performance: Performance) -> dict[str, float]:
    """memory in bytes, prefill and decode in ms."""
    return {
        "memory": performance.memory.total,
        "prefill": performance.prefill.value,
        "decode": performance.decode.value,
    }


def absolute_limits(budget: Budget, dense: Performance) -> dict[str, float]:
    """Every limit in bytes or ms; a relative memory limit counts all but the runtime's fixed part."""
    limits = {}
    for name, limit in budget.limits.items():
        if not limit.relative:
            limits[name] = limit.value
        elif name == "memory":
            limits[name] = limit.value * dense.memory.prunable + dense.memory.runtime.value
        else:
            limits[name] = limit.value * figures(dense)[name]
    return limits


def check(budget: Budget, dense: Performance, performance: Performance) -> list[Check]:
    """Every limit against what was obtained. A measured figure counts by its interval."""
    return [
        _check(name, budget.limits[name].asked, limit, performance)
        for name, limit in absolute_limits(budget, dense).items()
    ]


def _check(name: str, asked: str, limit: float, performance: Performance) -> Check:
    figure = memory_total(performance) if name == "memory" else getattr(performance, name)
    low, high = (figure.low, figure.high) if isinstance(figure, Measured) else (figure.value, figure.value)
    status: Status = "met" if high <= limit else "missed" if low > limit else "noisy"
    return Check(name, asked, limit, figure, status)


def memory_total(performance: Performance) -> Figure:
    """The five parts as one figure, of the weakest source among them."""
    from dataclasses import replace

    parts = list(performance.memory.parts.values())
    weakest = min(parts, key=lambda part: ("estimated", "built", "measured").index(part.source))
    total = performance.memory.total
    if isinstance(weakest, Measured):
        return replace(weakest, value=total, low=total, high=total)
    return replace(weakest, value=total)


def overall(checks: list[Check]) -> Status:
    """The worst status of all constraints."""
    found = {check.status for check in checks}
    return "missed" if "missed" in found else "noisy" if "noisy" in found else "met"


def format_bytes(value: float) -> str:
    """Binary units, as `1.50 GiB`."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(value) >= size:
            return f"{value / size:.2f} {unit}" if unit == "GiB" else f"{value / size:.1f} {unit}"
    return f"{value:.0f} B"


def format_milliseconds(value: float) -> str:
    return f"{value:.0f} ms" if value >= 100 else f"{value:.1f} ms" if value >= 10 else f"{value:.2f} ms"
