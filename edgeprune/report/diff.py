"""The differences of two bundles, as a document and in the terminal: verdict, figures, quality, widths, making.

It compares what two reports hold, and measures nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from edgeprune.errors import InputError
from edgeprune.report.base import Strict
from edgeprune.report.figures import OUTCOME_LABEL, formats_text, number_text, widths_text
from edgeprune.report.schema import Figure, Report

if TYPE_CHECKING:
    from rich.console import Console

Group = Literal["verdict", "figures", "quality", "model", "made of"]
GUARDS = ("memory", "latency", "quality")  # what --fail-on takes
NOT_THERE = "–"


class Difference(Strict):
    """One thing in two bundles."""

    group: Group
    name: str
    first: str
    second: str
    percent: float | None = Field(
        None, description="of the second figure over the first; none: no figures, or a first of 0"
    )

    @property
    def is_change(self) -> bool:
        return self.first != self.second


class DiffReport(Strict):
    """The differences of two bundles; figures stand in it whether they differ or not, all else where it differs."""

    first: str
    second: str
    differences: list[Difference]
    failed: list[str] = Field(description="guards of --fail-on that the second bundle fails, in words")


@dataclass(frozen=True)
class Made:
    """A bundle as it is compared: its name, its report, and what its manifest and run.toml tell of its making."""

    name: str
    report: Report
    manifest: Mapping[str, Any]
    options: Mapping[str, Any]


def diff_of(first: Made, second: Made, guards: Mapping[str, float]) -> DiffReport:
    """Returns the differences of two bundles.

    guards: percent by name of GUARDS that a figure of the second may be above the first's. Raises InputError for a
    guard whose figures are of different sources, or of texts that only one has.
    """
    rows = [*_verdict(first, second), *_figures(first, second), *_quality(first, second)]
    rows += [row for row in [*_model(first, second), *_making(first, second)] if row.is_change]
    failed = [words for name, percent in guards.items() for words in _failed(name, percent, first, second)]
    return DiffReport(first=first.name, second=second.name, differences=rows, failed=failed)


def _verdict(first: Made, second: Made) -> Iterator[Difference]:
    pairs = {
        "budget": [OUTCOME_LABEL[one.report.outcome] for one in (first, second)],
        "quality": [one.report.quality.grade for one in (first, second)],
    }
    for name, (old, new) in pairs.items():
        yield Difference(group="verdict", name=name, first=old, second=new)


def _figures(first: Made, second: Made) -> Iterator[Difference]:
    """Yields memory and latencies with their sources, and the number of parameters."""
    for name in ("memory_total", "prefill", "decode"):
        figures = [getattr(one.report.fitted.performance, name) for one in (first, second)]
        texts = [f"{number_text(one.value, one.unit)} ({one.source})" for one in figures]
        yield _row("figures", name.replace("_total", ""), texts, [one.value for one in figures])
    counts = [one.report.fitted.parameters for one in (first, second)]
    yield _row("figures", "parameters", [f"{count / 1e6:,.1f} M" for count in counts], counts)


def _quality(first: Made, second: Made) -> Iterator[Difference]:
    """Yields the perplexity of every text and the score of every task that one of the bundles has."""
    texts = [{text.name: text for text in one.report.quality.texts} for one in (first, second)]
    for name in dict.fromkeys([*texts[0], *texts[1]]):
        pair = [of.get(name) for of in texts]
        words = [NOT_THERE if one is None else f"{one.fitted:.2f}" for one in pair]
        same = _same_text(*pair) if None not in pair else False
        yield _row("quality", f"perplexity of {name}", words, [one.fitted for one in pair] if same else [0, 0])
    tasks = [{task.name: task for task in one.report.quality.tasks} for one in (first, second)]
    for name in dict.fromkeys([*tasks[0], *tasks[1]]):
        pair = [of.get(name) for of in tasks]
        words = [NOT_THERE if one is None else f"{one.fitted.percent:.1f} %" for one in pair]
        yield Difference(group="quality", name=f"score of {name}", first=words[0], second=words[1])


def _same_text(first: Any, second: Any) -> bool:
    """Returns whether two evaluations read the same text: as many documents and tokens, and the dense perplexity."""
    return (first.documents, first.tokens) == (second.documents, second.tokens) and abs(
        first.dense - second.dense
    ) <= 1e-3 * first.dense


def _model(first: Made, second: Made) -> Iterator[Difference]:
    sides = [one.report.fitted for one in (first, second)]
    for name, words in (("widths", widths_text), ("weights", formats_text), ("KV cache", lambda side: side.cache)):
        old, new = (words(side) for side in sides)
        yield Difference(group="model", name=name, first=old, second=new)


def _making(first: Made, second: Made) -> Iterator[Difference]:
    """Yields what the bundles were made of: model, calibration, options, versions."""
    for name, key in (("model", "model"), ("calibration data", "samples")):
        old, new = (str(one.manifest.get("fingerprint", {}).get(key, NOT_THERE))[:16] for one in (first, second))
        yield Difference(group="made of", name=name, first=old, second=new)
    options = [
        {**one.options, "device": one.report.device.name, "engine": one.report.engine.name} for one in (first, second)
    ]
    versions = [{"edgeprune": one.report.edgeprune, **one.report.versions} for one in (first, second)]
    for kind, pair in (("--", options), ("version of ", versions)):
        for name in dict.fromkeys([*pair[0], *pair[1]]):
            old, new = (str(of.get(name, NOT_THERE)) for of in pair)
            yield Difference(group="made of", name=f"{kind}{name.replace('_', '-')}", first=old, second=new)


def _row(group: Group, name: str, texts: list[str], values: list[float]) -> Difference:
    percent = 100 * (values[1] / values[0] - 1) if values[0] else None
    return Difference(group=group, name=name, first=texts[0], second=texts[1], percent=percent)


def _failed(guard: str, percent: float, first: Made, second: Made) -> Iterator[str]:
    """Yields in words each figure of a guard that is above the first's by more than its percent."""
    if guard == "quality":
        pairs = list(_perplexities(first, second))
    else:
        names = ("memory_total",) if guard == "memory" else ("prefill", "decode")
        pairs = [(name.replace("_total", ""), *_figures_of(name, first, second)) for name in names]
    for name, old, new in pairs:
        above = 100 * (new / old - 1)
        if not above <= percent:
            yield f"{name} is {above:.1f} % above {first.name}'s; {guard} allows {percent:g} %"


def _perplexities(first: Made, second: Made) -> Iterator[tuple[str, float, float]]:
    """Yields the perplexities of the texts that both were judged on. Raises InputError where there is none."""
    old, new = ({text.name: text for text in one.report.quality.texts} for one in (first, second))
    shared = [name for name in old if name in new and _same_text(old[name], new[name])]
    if not shared:
        raise InputError(
            f"{first.name} and {second.name} were judged on different texts: quality cannot be guarded",
            "Fit both with the same --evaluate.",
        )
    for name in shared:
        yield f"perplexity of {name}", old[name].fitted, new[name].fitted


def _figures_of(name: str, first: Made, second: Made) -> tuple[float, float]:
    """Returns a figure of both. Raises InputError where they are of different sources or devices."""
    old, new = (getattr(one.report.fitted.performance, name) for one in (first, second))
    if (old.source, old.device) != (new.source, new.device):
        told = " and ".join(f"{_source(one)} of {of.name}" for one, of in ((old, first), (new, second)))
        raise InputError(f"{name.replace('_total', '')} is {told}: it cannot be guarded", "Measure both on one device.")
    return old.value, new.value


def _source(figure: Figure) -> str:
    return f"{figure.source} for {figure.device}"


def print_diff(report: DiffReport, console: Console) -> None:
    """Prints the differences by group, and the guards that failed."""
    from edgeprune.report.terminal import styled, table

    rows, group = [], None
    for one in report.differences:
        change = "" if one.percent is None or not one.is_change else f"{one.percent:+.1f} %"
        style = "" if one.is_change else "dim"
        cells = ("" if one.group == group else one.group, one.name, one.first, one.second, change)
        rows.append([styled(cell, style) for cell in cells])
        group = one.group
    console.print(table(("", "", report.first, report.second, ""), rows))
    for words in report.failed:
        console.print(styled(f"Failed: {words}", "bold red"))
