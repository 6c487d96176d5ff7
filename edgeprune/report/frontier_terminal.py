"""The ladder as the command line shows it; 80 columns are enough. It adds no figure to the document."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune.report.figures import NAMES, interval_of, no_interval_text, number_text
from edgeprune.report.frontier import Dense, Frontier, Rung, pick_command
from edgeprune.report.quality import worst_text
from edgeprune.report.schema import Figure
from edgeprune.report.tasks import points_text
from edgeprune.report.terminal import styled, table

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

STYLES = {"intact": "green", "degraded": "yellow", "broken": "red"}
FIGURES = {"decode": "ms/token", "prefill": "ms to first", "memory": "MiB"}  # field: head with the unit
MIB = 2**20


def print_frontier(frontier: Frontier, bundle: Path, console: Console) -> None:
    """Prints a line for each rung, where quality ends, the sources of all figures, and how to pick."""
    # The heading: the model, the device and the workload.
    workload = frontier.workload
    console.print(
        styled(
            f"{frontier.model.name} on {frontier.device.name}: batch {workload.batch}, prompt {workload.prompt}, "
            f"context {workload.context}, {frontier.precision}",
            "bold",
        )
    )
    console.print()
    # The table, the dense model first, and the notes on it.
    columns = ("rung", *FIGURES.values(), "pruned", "rise", "interval", "quality")
    rows = [_row(frontier, point) for point in (frontier.dense, *frontier.rungs)]
    console.print(table(columns, rows, whole=("rung", "pruned", "rise", "quality")))
    console.print()
    if tasks := task_rows(frontier):
        console.print(table(tasks[0], tasks[1:], whole=("rung",)))
        console.print()
    for line in (_ends(frontier), _sources(frontier), *_notes(frontier)):
        console.print(styled(line))
    console.print()
    # The command; not wrapped, so that it can be copied.
    console.print(styled(f"Pick rung K:  {pick_command(bundle, 'K')}"), soft_wrap=True)


def _row(frontier: Frontier, point: Dense | Rung) -> tuple[str | Text, ...]:
    """Returns the cells of the dense model or of a rung; `?` marks a grade that its interval does not settle."""
    # A figure names its source where its column holds several.
    figures = []
    for field in FIGURES:
        figure = getattr(point, field)
        own = f" ({figure.source})" if len(frontier.sources(field)) > 1 else ""
        figures.append(_number(figure) + own)
    if isinstance(point, Dense):
        return ("dense", *figures, "", "", "", "")
    mark = "?" if len(point.grades) > 1 else ""
    return (
        str(point.index),
        *figures,
        f"{100 * point.ratio:.0f} %",
        number_text(point.rise_percent, "%"),
        interval_of(point).removesuffix(" %"),
        styled(f"{point.grade}{mark}", STYLES[point.grade]),
    )


def task_rows(frontier: Frontier) -> list[tuple[str, ...]]:
    """Returns the heads and the rows of the table of task scores, the dense model first; empty: none was asked for."""
    asked = frontier.rungs[0].tasks if frontier.rungs else []
    if not asked:
        return []
    dense = [f"{task.dense.percent:.1f} %" if task.dense else "" for task in asked]
    rows = [
        (str(rung.index), *(f"{task.fitted.percent:.1f} %, {points_text(task.difference)}" for task in rung.tasks))
        for rung in frontier.rungs
    ]
    return [("rung", *(task.name for task in asked)), ("dense", *dense), *rows]


def _ends(frontier: Frontier) -> str:
    """Returns where quality ends, in words."""
    fastest = (
        (words, frontier.fastest(grades))
        for words, grades in (("intact", ("intact",)), ("not broken", ("intact", "degraded")))
    )
    return (
        "Fastest "
        + "; fastest ".join(
            f"{words}: " + ("no rung" if rung is None else f"rung {rung.index}, {number_text(rung.decode.value, 'ms')}")
            for words, rung in fastest
        )
        + "."
    )


def _sources(frontier: Frontier) -> str:
    """Returns the columns by source; where a column has several, its cells name their own."""
    by_source: dict[str, list[str]] = {}
    for field in FIGURES:
        if len(sources := frontier.sources(field)) == 1:
            by_source.setdefault(sources[0], []).append(NAMES[field])
    by_source.setdefault("measured", []).append("rise")
    return "; ".join(f"{', '.join(words)}: {source}" for source, words in by_source.items()) + "."


def _notes(frontier: Frontier) -> list[str]:
    """Returns how the columns of the rise and of the quality are to be read."""
    several = bool(frontier.rungs) and len(frontier.rungs[0].texts) > 1
    notes = [f"rise: of perplexity{' on the worst text' if several else ''}, with its 95 % interval."]
    if frontier.label != "perplexity":
        own = "pictures" if frontier.dense.grid else "text"
        notes.append(f"Quality is agreement with the dense model, on {own} of its own.")
    if any(rung.tasks for rung in frontier.rungs):
        notes.append("Task scores: measured, with what the rung gains in points, of the same questions, 95 % interval.")
    notes += [
        f"rung {rung.index}: {rung.finding}" for rung in frontier.rungs if rung.finding and rung.grade != "broken"
    ]
    notes += [f"{reason}." for reason in dict.fromkeys(filter(None, map(_no_interval, frontier.rungs)))]
    if any(len(rung.grades) > 1 for rung in frontier.rungs):
        notes.append("?: the interval reaches into another grade.")
    return notes


def _no_interval(rung: Rung) -> str:
    """Returns why the rise of a rung has no interval; empty where it has one."""
    if interval_of(rung):
        return ""
    reason = no_interval_text(worst_text(rung.texts), "picture" if rung.grid else "document")
    return f"rung {rung.index}: {reason}" if rung.rise_percent == 0 else reason


def _number(figure: Figure) -> str:
    """Returns a time in ms or a memory in MiB without its unit, which the column names."""
    if figure.unit == "bytes":
        return f"{figure.value / MIB:.1f}"
    return number_text(figure.value, figure.unit).removesuffix(" ms")
