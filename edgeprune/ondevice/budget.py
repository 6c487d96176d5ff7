"""The budget: limits for memory, prefill and decode, absolute or relative to the dense model; and the verdict.

Sizes are understood as written: 1 GiB is 1024^3 bytes, 1 GB is 1000^3. This file knows nothing about models, devices
or the way a figure was obtained, beyond the source that each figure carries.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from fractions import Fraction
from math import isfinite, isnan
from typing import Any, Literal

from edgeprune.errors import InputError
from edgeprune.ondevice.figures import Figure, Measured, Performance, figure_to_json, performance_to_json

Status = Literal["met", "missed", "noisy"]
Source = Literal["measured", "built", "estimated"]

BROKEN_PERCENT = 30.0  # rise of perplexity from which a model is broken: it meets no budget
NO_LIMIT = "off"
MOST_PERCENT = 10_000
CONSTRAINTS = ("memory", "prefill", "decode")
OF_QUALITY = ("quality", "agreement", "tasks")  # limits in a report that no device changes
STATUS_TEXT: dict[Status, str] = {
    "met": "met",
    "missed": "missed",
    "noisy": "too noisy to tell: run again on an idle machine",
}
SIZE_FORMS = "1.5GiB, 900MB or a share of the dense model such as 70%"
LATENCY_FORMS = "25ms, 0.5s or a share of the dense model such as 70%"
PERCENT_FORMS = "a percentage such as 70%"

_SIZE_UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
_LATENCY_UNITS = {"US": Fraction(1, 1000), "MS": Fraction(1), "S": Fraction(1000)}
_SOURCES: tuple[Source, ...] = ("estimated", "built", "measured")  # weakest first
_FORM = re.compile(r"([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*([a-zA-Z%]*)")


@dataclass(frozen=True)
class Limit:
    """One limit of a budget.

    value: in bytes or ms; where relative, a share of the dense model's figure (0 to 1). asked: as the user wrote it.
    """

    value: float
    relative: bool
    asked: str = field(default="", compare=False)


@dataclass(frozen=True)
class AbsoluteBudget:
    """A budget with its relative limits resolved: memory in bytes, prefill and decode in ms."""

    memory: float | None = None
    prefill: float | None = None
    decode: float | None = None

    @property
    def limits(self) -> dict[str, float]:
        """The limits that are set, by constraint."""
        return {name: limit for name in CONSTRAINTS if (limit := getattr(self, name)) is not None}


@dataclass(frozen=True)
class Budget:
    """The limits of a fit.

    max_quality_loss: the acceptable loss in the unit of the quality metric, in percent of perplexity where no other was
    chosen; max_task_drop: of every task's score, in points.
    """

    memory: Limit | None = None
    prefill: Limit | None = None
    decode: Limit | None = None
    max_quality_loss: float | None = None
    max_task_drop: float | None = None

    @property
    def limits(self) -> dict[str, Limit]:
        """The limits that are set, by constraint."""
        return {name: limit for name in CONSTRAINTS if (limit := getattr(self, name)) is not None}

    def absolute(self, dense: Performance) -> AbsoluteBudget:
        """Returns the budget with its relative limits resolved against the dense model.

        A relative memory limit is a share of all but the runtime's fixed part, which is added to it.
        """

        def resolve(name: str, limit: Limit) -> float:
            if not limit.relative:
                return limit.value
            if name == "memory":
                return limit.value * dense.memory.prunable + dense.memory.runtime.value
            return limit.value * getattr(dense, name).value

        return AbsoluteBudget(**{name: resolve(name, limit) for name, limit in self.limits.items()})


def in_parts(name: str, limit: Limit, dense: Performance) -> str | None:
    """Returns how a relative limit was reckoned, as `470.2 MiB = 90 % of the dense model's 45.6 MiB + 429.2 MiB
    runtime`, with the source of what it is a share of; None for an absolute limit."""
    if not limit.relative:
        return None
    value = getattr(Budget(**{name: limit}).absolute(dense), name)
    share = f"{100 * limit.value:g} % of the dense model's"
    if name == "memory":
        prunable, runtime = format_bytes(dense.memory.prunable), format_bytes(dense.memory.runtime.value)
        return f"{format_bytes(value)} = {share} {prunable} + {runtime} runtime, {memory_total(dense).source}"
    figure: Figure = getattr(dense, name)
    return f"{format_ms(value)} = {share} {format_ms(figure.value)}, {figure.source}"


@dataclass(frozen=True)
class Check:
    """One constraint with the figure that was obtained and its status; limit and figure in bytes or ms.

    ratio: the figure that decided instead, where a latency was compared with the dense model's in the same run.
    """

    name: str
    asked: str
    limit: float
    figure: Figure
    status: Status
    ratio: Measured | None = None


@dataclass(frozen=True)
class Verdict:
    """The checks of all constraints.

    source: the weakest among the figures that it rests on (`estimated` if there is no constraint).
    """

    checks: tuple[Check, ...]
    source: Source

    @property
    def status(self) -> Status:
        """The worst status of all constraints."""
        return _worst(check.status for check in self.checks)

    @property
    def met(self) -> bool:
        """Returns whether every constraint is met."""
        return self.status == "met"


def parse_size(text: str) -> int:
    """Returns the bytes of `1.5GiB`, `900MB` or `2 GB`, rounded. Raises InputError."""
    number, unit = _split(text, "size", SIZE_FORMS)
    if (factor := _SIZE_UNITS.get(unit.upper())) is None:
        raise _malformed(text, "size", _size_remedy(text, unit), number, unit)
    if (value := round(number * factor)) == 0:
        raise InputError(f"the size {text!r} is less than a byte", f"Write it as {SIZE_FORMS}.")
    return value


def parse_latency(text: str) -> float:
    """Returns the milliseconds of `25ms` or `0.5s`. Raises InputError."""
    number, unit = _split(text, "latency", LATENCY_FORMS)
    if (factor := _LATENCY_UNITS.get(unit.upper())) is None:
        forms = f"Write {text.strip()}ms or {text.strip()}s, or a share of the dense model such as 70%."
        raise _malformed(text, "latency", f"Write it as {LATENCY_FORMS}." if unit else forms, number, unit)
    return _positive_float(number * factor, text, "latency", LATENCY_FORMS)


def parse_percent(text: str) -> float:
    """Returns the share of `70%`, which is above 0 and at most 1. Raises InputError."""
    number, unit = _split(text, "share", PERCENT_FORMS)
    if unit != "%":
        raise _malformed(text, "share", f"Write it as {PERCENT_FORMS}.", number, unit)
    if number > 100:
        raise InputError(
            f"the share {text!r} is more than 100 %, which the dense model itself needs",
            "Give at most 100%, or an absolute limit.",
        )
    return _positive_float(number / 100, text, "share", PERCENT_FORMS)


def parse_limit(constraint: str, text: str) -> Limit:
    """Returns the limit for `memory`, `prefill` or `decode`, absolute or in percent.

    Raises InputError that names the constraint.
    """
    try:
        if text.strip().endswith("%"):
            return Limit(parse_percent(text), relative=True, asked=text.strip())
        value = parse_size(text) if constraint == "memory" else parse_latency(text)
    except InputError as error:
        raise InputError(f"{constraint} budget: {error.message}", error.remedy) from None
    return Limit(value, relative=False, asked=text.strip())


def parse_budget(
    memory: str | None,
    prefill: str | None,
    decode: str | None,
    max_quality_loss: str | float | None = None,
    max_task_drop: str | None = None,
    broken: float = BROKEN_PERCENT,
) -> Budget:
    """Returns the budget that texts describe; max_quality_loss in percent or points, with or without its unit.

    Without one, a broken model meets nothing: the limit is the loss from which a model is `broken`, which `off` lifts.
    Raises InputError.
    """
    texts = {"memory": memory, "prefill": prefill, "decode": decode}
    limits = {name: parse_limit(name, text) for name, text in texts.items() if text is not None}
    drop = None if max_task_drop is None else _task_drop(max_task_drop)
    if max_quality_loss == NO_LIMIT:
        return Budget(**limits, max_task_drop=drop)
    quality = broken if max_quality_loss is None else _quality_loss(max_quality_loss)
    return Budget(**limits, max_quality_loss=quality, max_task_drop=drop)


def _task_drop(asked: str) -> float:
    """Returns points as a number above 0. Raises InputError."""
    points = _number_of(asked)
    if not 0 < points <= 100:
        raise InputError(
            f"the limit {asked!r} on tasks is not a number of points above 0 and up to 100",
            "Write how many points of percent a score may fall: --max-task-drop 2",
        )
    return points


def _number_of(asked: str | float) -> float:
    """Returns a number with or without `%` or `points`; what is none is not a number."""
    try:
        return float(asked.strip().removesuffix("%").removesuffix("points") if isinstance(asked, str) else asked)
    except ValueError:
        return float("nan")


def _quality_loss(asked: str | float) -> float:
    """Returns a percentage as a number, 0 or more. Raises InputError."""
    percent = _number_of(asked)
    if not (isfinite(percent) and percent >= 0):
        raise InputError(
            f"the quality limit {asked!r} is not a percentage from 0 up",
            f"Write the acceptable rise of perplexity, such as --max-quality-loss 10%, or {NO_LIMIT} for none.",
        )
    return percent


def _split(text: str, what: str, forms: str) -> tuple[Fraction, str]:
    """Returns the exact, positive number and the unit of a text. Raises InputError."""
    match = _FORM.fullmatch(text.strip())
    if match is None:
        raise InputError(f"malformed {what} {text!r}: not a number with a unit", f"Write it as {forms}.")
    # The float is checked first: an exponent of many digits would make the exact number fill the memory.
    _positive_float(float(match[1]), text, what, forms)
    return Fraction(match[1]), match[2]


def _positive_float(number: Fraction | float, text: str, what: str, forms: str) -> float:
    """Returns the number as a float. Raises InputError where it is not positive or not finite."""
    try:
        value = float(number)
    except OverflowError:
        value = float("inf")
    if not 0 < value < float("inf"):
        reason = "is negative" if value < 0 else "is zero" if value == 0 else "is too large"
        raise InputError(f"the {what} {text!r} {reason}", f"Write it as {forms}.")
    return value


def _size_remedy(text: str, unit: str) -> str:
    """Returns what to write for a size whose unit is missing or stands for two: `6` and `6G` may be GiB or GB."""
    letter = unit.upper() or "G"
    if letter not in ("K", "M", "G", "T"):
        return f"Write it as {SIZE_FORMS}."
    number = text.strip().removesuffix(unit).strip()
    binary, decimal = f"{letter}iB", f"{letter}B"
    return (
        f"Write {number}{binary} ({_SIZE_UNITS[binary.upper()]} bytes a {binary}) or "
        f"{number}{decimal} ({_SIZE_UNITS[decimal]} bytes a {decimal}), or a share of the dense model such as 70%."
    )


def _malformed(text: str, what: str, remedy: str, number: Fraction, unit: str) -> InputError:
    """Returns the error for a text whose unit is missing or unknown."""
    understood = f"{float(number):g} {unit}".strip()
    reason = f"{unit!r} is not a unit of {what}" if unit else "it has no unit"
    return InputError(f"malformed {what} {text!r}: understood {understood}, but {reason}", remedy)


def describe(budget: Budget) -> str:
    """Returns the limits in words, as `memory 1610612736 bytes (1.50 GiB), decode 70% of the dense model`."""
    return ", ".join(f"{name} {_understood(name, limit)}" for name, limit in budget.limits.items())


def _understood(name: str, limit: Limit) -> str:
    if limit.relative:
        return f"{100 * limit.value:g}% of the dense model"
    return f"{limit.value:.0f} bytes ({format_bytes(limit.value)})" if name == "memory" else format_ms(limit.value)


def judge(budget: Budget, dense: Performance, performance: Performance) -> Verdict:
    """Returns the verdict of a budget on the performance that was obtained.

    A measured figure counts by its interval: it is met where the whole interval lies at or below the limit, missed
    where the whole interval lies above it, else noisy. Other figures count by their value. A latency that has a
    ratio to the dense model, interleaved in the same run, counts by that ratio: a relative limit is compared with
    the ratio itself, an absolute one with the dense model's latency times the ratio, which leaves out what the
    machine did between the two runs. The dense model itself is at 100 % by definition.
    """
    absolute = budget.absolute(dense)
    checks = tuple(
        _check(name, limit, absolute.limits[name], dense, performance) for name, limit in budget.limits.items()
    )
    sources = [figure.source for check in checks for figure in (check.figure, check.ratio) if figure is not None]
    return Verdict(checks, min(sources, key=_SOURCES.index, default="estimated"))


def _check(name: str, limit: Limit, absolute: float, dense: Performance, performance: Performance) -> Check:
    """Returns the check of one constraint, as judge describes it; absolute: the limit in bytes or ms."""
    asked = limit.asked or _understood(name, limit)
    if name == "memory":
        figure = memory_total(performance)
        return Check(name, asked, absolute, figure, _status(figure, absolute))
    figure: Figure = getattr(performance, name)
    ratio: Measured | None = getattr(performance, f"{name}_ratio")
    if ratio is None:
        if limit.relative and performance == dense:
            return Check(name, asked, absolute, figure, "met" if limit.value >= 1 else "missed")
        return Check(name, asked, absolute, figure, _status(figure, absolute))
    if limit.relative:
        return Check(name, asked, absolute, figure, _status(ratio, limit.value), ratio)
    figure = _scaled(getattr(dense, name), ratio)
    return Check(name, asked, absolute, figure, _status(figure, absolute), ratio)


def judge_quality(
    budget: Budget, losses: Iterable[tuple[float, float]], drops: Iterable[tuple[float, float]] = ()
) -> Status:
    """Returns the worse status of the limits on quality and on tasks; without a limit it is met.

    losses: the intervals (low, high) of the loss by the quality metric, as of the rise in percent on each text; drops:
    of each task's fall in points.
    """
    limited = ((budget.max_quality_loss, losses), (budget.max_task_drop, drops))
    return _worst(_compare(low, high, limit) for limit, found in limited if limit is not None for low, high in found)


def _status(figure: Figure, limit: float) -> Status:
    if isinstance(figure, Measured):
        return _compare(figure.low, figure.high, limit)
    return _compare(figure.value, figure.value, limit)


def _compare(low: float, high: float, limit: float) -> Status:
    return "met" if high <= limit else "noisy" if low <= limit else "missed"  # a figure that is not a number is missed


def _worst(statuses: Iterable[Status]) -> Status:
    distinct = set(statuses)
    return "missed" if "missed" in distinct else "noisy" if "noisy" in distinct else "met"


def _scaled(dense: Figure, ratio: Measured) -> Figure:
    """Returns the dense figure times the ratio, of the same source as the dense figure."""
    if isinstance(dense, Measured):
        low, high = dense.low * ratio.low, dense.high * ratio.high
        return replace(dense, value=dense.value * ratio.value, low=low, high=high)
    return replace(dense, value=dense.value * ratio.value)


def reported(performance: Performance) -> dict[str, Any]:
    """Returns a performance as reports hold it: its figures as JSON, with the total of the memory."""
    shown = performance_to_json(performance)
    del shown["notes"]  # reports hold them among the warnings
    return {**shown, "memory_total": figure_to_json(memory_total(performance))}


def memory_total(performance: Performance) -> Figure:
    """Returns the five parts of the memory as one figure in bytes, of the weakest source among them."""
    figures = list(performance.memory.parts.values())
    weakest = min(figures, key=lambda figure: _SOURCES.index(figure.source))
    total = performance.memory.total
    if isinstance(weakest, Measured):  # then all parts are
        low, high = sum(figure.low for figure in figures), sum(figure.high for figure in figures)
        return replace(weakest, value=total, low=low, high=high)
    return replace(weakest, value=total, basis="sum of weights, cache, activations, buffers and runtime")


def format_bytes(value: float) -> str:
    """Returns a number of bytes in binary units, as `1.50 GiB` or `270.0 MiB`."""
    for unit, size, digits in (("GiB", 2**30, 2), ("MiB", 2**20, 1), ("KiB", 2**10, 1)):
        if round(abs(value) / size, digits) >= 1:
            return f"{value / size:.{digits}f} {unit}"
    return f"{value:.0f} B"


def format_percent(value: float) -> str:
    """Returns a change in percent as `+3.2 %`, as `2.2-fold` from 100 % on, and in words where no number says more."""
    if isnan(value):
        return "not a number"
    if value >= MOST_PERCENT:
        return f"more than {MOST_PERCENT // 100}-fold"
    if value >= 100:
        factor = 1 + value / 100
        return f"{factor:.1f}-fold" if factor < 10 else f"{factor:.0f}-fold"
    return f"{value:+.1f} %" if value > -100 else f"{value:+.0f} %"


def format_ms(value: float) -> str:
    """Returns milliseconds with three digits or more, as `6.15 ms`, `52.6 ms` or `1384 ms`."""
    digits = 2 if round(abs(value), 2) < 10 else 1 if round(abs(value), 1) < 100 else 0
    return f"{value:.{digits}f} ms"
