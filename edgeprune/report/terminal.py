"""Reports and comparisons as the command line shows them; 80 columns are enough. It adds no figure to them.

Texts of users and models are shown as they are: no markup, no control characters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeprune.ondevice.budget import format_bytes
from edgeprune.report.figures import (
    NAMES,
    OUTCOME_LABEL,
    OUTCOME_TEXT,
    alone_text,
    deciding_text,
    difference_text,
    few_pictures_text,
    half_identical,
    headroom_text,
    interval_text,
    levers_text,
    number_text,
    percent_text,
    perplexity_text,
    picture_room_text,
    pictures_text,
    reading_text,
    recovery_text,
    rise_text,
    rivals_text,
    room_text,
    shorten,
    times_text,
)
from edgeprune.report.schema import Figure, Quality, Report
from edgeprune.report.tasks import TASK_COLUMNS, task_row, task_text
from edgeprune.report.verdict import broken_text, cost_text, is_broken, made_text, next_step, verdict

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from edgeprune.pipeline.comparison import Row
    from edgeprune.report.images import Pictures
    from edgeprune.report.tasks import TaskScores

STYLES = {"met": "green", "missed": "red", "out_of_reach": "red", "noisy": "yellow", "uncertain": "yellow"}
SAMPLE_CHARACTERS = 160
WARNINGS = 3


def styled(value: str, style: str = "") -> Text:
    """Returns a text that is printed as it is: nothing in it moves the cursor or recolours the terminal."""
    from rich.text import Text

    return Text("".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in value), style=style)


def table(columns: Sequence[str], rows: Iterable[Sequence[str | Text]], whole: Sequence[str] = ()) -> Table:
    """Returns a table without rules; the columns in `whole` are never broken."""
    from rich.table import Table

    grid = Table(box=None, pad_edge=False, header_style="dim", show_header=any(columns))
    for column in columns:
        grid.add_column(styled(column), overflow="fold", no_wrap=column in whole)
    for row in rows:
        grid.add_row(*(styled(cell) if isinstance(cell, str) else cell for cell in row))
    return grid


def print_report(report: Report, console: Console) -> None:
    """Prints the verdict and what it costs, each limit with the source of its figure, both samples, the next step."""
    # The verdict; a broken model comes before all else, and nothing of it is green.
    style = STYLES["missed" if is_broken(report) else report.outcome]
    if is_broken(report):
        console.print(styled(broken_text(report), f"bold {style}"))
    console.print(styled(verdict(report), f"bold {style}"))
    console.print(styled(cost_text(report)))
    console.print()
    # The limits, and what the model is like.
    console.print(_constraints(report))
    console.print()
    console.print(table(("", ""), ((styled(name, "dim"), value) for name, value in _summary(report))))
    # The next step; its command is not wrapped, so that it can be copied.
    step = next_step(report)
    console.print()
    console.print(styled(f"Next: {step.title}{':' if step.command else '.'}"))
    if step.command:
        console.print(styled(step.command), soft_wrap=True)


def _constraints(report: Report) -> Table:
    """Returns the table of the limits with their verdicts, then the rest of memory and times."""
    # What was limited.
    rows: list[tuple[str | Text, ...]] = [
        (
            NAMES[row.name],
            number_text(row.limit, row.unit),
            *_figures(row.dense, row.fitted),
            headroom_text(row),
            styled(OUTCOME_LABEL[row.status], "" if is_broken(report) else STYLES[row.status]),
        )
        for row in report.budget
    ]
    # What was not: it has neither limit nor verdict.
    limited = {row.name for row in report.budget}
    for name, field in (("memory", "memory_total"), ("prefill", "prefill"), ("decode", "decode")):
        if name not in limited:
            dense, fitted = (getattr(side.performance, field) for side in (report.dense, report.fitted))
            rows.append((NAMES[name], "", *_figures(dense, fitted), "", ""))
    columns = ("limit on", "limit", "dense", "fitted", "source", "headroom", "verdict")
    return table(columns, rows, whole=columns[1:-1])


def _figures(dense: Figure | None, fitted: Figure) -> tuple[str, str, str]:
    """Returns both figures and their source; a dense figure of another source names its own."""
    shown = "" if dense is None else number_text(dense.value, dense.unit)
    if dense is not None and dense.source != fitted.source:
        shown += f" ({dense.source})"
    return shown, number_text(fitted.value, fitted.unit), fitted.source


def _summary(report: Report) -> list[tuple[str, str]]:
    """Returns the lines below the table, each with its heading; only the first few warnings are shown."""
    # The samples and the warnings come last.
    quality = report.quality
    samples = {"asked": quality.prompt, "dense": quality.dense_sample, "fitted": quality.fitted_sample}
    warnings = [("mind", warning) for warning in report.warnings[:WARNINGS]]
    if (more := len(report.warnings) - WARNINGS) > 0:
        warnings.append(("", f"and {more} more in the report"))
    # Speed and quality first, then what was removed and what decided.
    return [
        *(("limit", f"{row.name} {row.in_parts}") for row in report.budget if row.in_parts),
        *_noticed(report),
        ("times", times_text(report)),
        ("quality", _quality(quality)),
        *_same(quality),
        *(("task", task_text(task)) for task in quality.tasks),
        *_odd(report),
        *(_pictures(quality.pictures) if quality.pictures else []),
        ("made", f"{made_text(report)}; {percent_text(report.decode_bytes_ratio)} fewer bytes are moved per token"),
        *([("levers", levers_text(report.levers)), ("alone", alone_text(report.levers))] if report.levers else []),
        *([("recovery", recovery_text(report.recovery))] if report.recovery else []),
        *([("ranking", ranking)] if (ranking := rivals_text(report)) else []),
        *([("decides", deciding)] if (deciding := deciding_text(report.budget)) else []),
        *_budget_or_quality(report),
        ("fixed", report.unprunable),
        *(
            (name, shorten(" ".join(sample.split()), SAMPLE_CHARACTERS))
            for name, sample in samples.items()
            if sample is not None
        ),
        *warnings,
    ]


def _budget_or_quality(report: Report) -> list[tuple[str, str]]:
    """Returns the nearest points where budget and quality cannot both be had; nothing elsewhere."""
    if (stop := report.quality_stop) is None:
        return []
    sides = {
        "within": (report.fitted.performance, report.quality.rise_percent),
        "beyond": (stop.performance, stop.rise_percent),
    }
    words = {"within": "the quality limit, smallest", "beyond": f"it; the budget: {OUTCOME_TEXT[stop.status]}"}
    # One line for each, with its perplexity and all figures.
    return [
        (
            name,
            f"{words[name]}: perplexity {number_text(rise, '%')}, "
            + ", ".join(
                f"{NAMES[label]} {number_text(figure.value, figure.unit)} ({figure.source})"
                for label, figure in (("memory", side.memory_total), ("prefill", side.prefill), ("decode", side.decode))
            ),
        )
        for name, (side, rise) in sides.items()
    ]


def _noticed(report: Report) -> list[tuple[str, str]]:
    """Returns what a user will notice, with the dense model's in brackets."""
    dense, fitted = (report.experience[name] for name in ("dense", "fitted"))
    if report.quality.pictures:
        return _noticed_of_pictures(report)
    rate = number_text(fitted.tokens_per_second.value, "tokens/s")
    speed = (
        f"first token after {number_text(fitted.first_token.value, 'ms')}, then {rate}: {reading_text(fitted)} "
        f"(dense {reading_text(dense).split()[0]} x), {fitted.tokens_per_second.source}"
    )
    context, sequences = (
        f"{room_text(getattr(fitted, name), fitted)} (dense: {room_text(getattr(dense, name), dense)})"
        for name in ("longest_context", "sequences")
    )
    room = f"context up to {context}; at context {report.workload.context}: {sequences}; estimated, for memory alone"
    return [("speed", speed), ("room", room)]


def _noticed_of_pictures(report: Report) -> list[tuple[str, str]]:
    """Returns what a user will notice of an image generator, with the dense model's in brackets."""
    dense, fitted = (report.experience[name] for name in ("dense", "fitted"))
    rows = []
    if (time := fitted.seconds_per_image) and (before := dense.seconds_per_image):
        times = f"{number_text(time.value, time.unit)} (dense {number_text(before.value, before.unit)})"
        at_once = pictures_text(report.quality.pictures.at_once)
        rows.append(("speed", f"a picture takes {times}, with {at_once} at once and without the codec, {time.source}"))
    room = f"{picture_room_text(fitted, report)} at once (dense: {picture_room_text(dense, report)})"
    return [*rows, ("room", f"{room}; estimated, for memory alone")]


def _pictures(pictures: Pictures) -> list[tuple[str, str]]:
    """Returns how far both models' pictures are from the reference."""
    dense, fitted = pictures.dense, pictures.fitted
    if dense is None or fitted is None:
        return [("pictures", f"no distances: {pictures.missing}")]
    kernel = f"kernel distance to {pictures.reference} {interval_text(fitted.kernel)}"
    rows = [("pictures", f"{kernel}, dense {interval_text(dense.kernel)}, measured")]
    if pictures.difference:
        rows.append(("", f"{interval_text(pictures.difference)} more, paired: {difference_text(pictures.difference)}"))
    return [
        *rows,
        (
            "",
            f"Frechet distance {fitted.frechet.value:.3g} (dense {dense.frechet.value:.3g}), precision "
            f"{fitted.precision.value:.2f} (dense {dense.precision.value:.2f}), recall {fitted.recall.value:.2f} "
            f"(dense {dense.recall.value:.2f})",
        ),
        ("", few_pictures_text(pictures)),
    ]


def _same(quality: Quality) -> list[tuple[str, str]]:
    """Returns how many whole answers of both models begin alike."""
    if not quality.answers:
        return []
    step = half_identical(quality.answers)
    same = f"{step.same} of {step.answers} answers"
    return [("", f"{same} begin with the same {number_text(step.tokens, 'tokens')}, on this machine")]


def _odd(report: Report) -> list[tuple[str, str]]:
    """Returns the rise of perplexity on each kind of odd input, the worst first."""
    if not report.robustness:
        return []
    clean, *others = report.robustness.variants
    worst_first = sorted(others, key=lambda variant: -variant.rise_percent)
    rises = ", ".join(f"{variant.name} {number_text(variant.rise_percent, '%')}" for variant in worst_first)
    return [("odd input", f"{rises}; the same text as it is {number_text(clean.rise_percent, '%')}, measured")]


def _quality(quality: Quality) -> str:
    """Returns the grade, and the perplexity of both models on each text."""
    document, noun = ("picture", "pictures") if quality.pictures else ("document", "text")
    words = [f"{quality.grade}, measured"]
    if quality.label != "perplexity":
        words.append(f"{quality.label}, on {noun} of its own")
    words += [
        f"{shorten(text.name, 40)}: perplexity {perplexity_text(text.dense)} (dense) to "
        f"{perplexity_text(text.fitted)}, {text.documents:,} {document}{'s' if text.documents != 1 else ''}"
        for text in quality.texts
    ]
    return "; ".join(words)


def print_task_scores(report: TaskScores, console: Console) -> None:
    """Prints a line for each task: both models' scores, and their difference with its interval."""
    console.print(styled(f"{report.model}: {report.judged}, context {report.context}, measured here"))
    if report.dense:
        console.print(styled(f"dense: {report.dense}; difference with the 95 % interval over the same questions"))
    console.print()
    console.print(table(TASK_COLUMNS, map(task_row, report.tasks), whole=TASK_COLUMNS[1:]))


def print_comparison(rows: Sequence[Row], console: Console) -> None:
    """Prints a table for each layout: a line for each method, with perplexity on each text and the rise of its
    logarithm in nats per token with its interval."""
    # The dense model, which comes first in the rows.
    dense = rows[0]
    texts = list(dense.perplexity)
    perplexities = ", ".join(f"{text} {dense.perplexity[text]:.2f}" for text in texts)
    console.print(
        f"dense: perplexity {perplexities}; {dense.parameters / 1e6:.1f} M parameters, "
        f"{format_bytes(dense.decode_bytes)} moved per token in fp16",
        markup=False,
    )
    console.print(
        "rise: log perplexity over the dense model in nats per token, measured here [95 % interval]", markup=False
    )
    # The methods, by layout.
    columns = (
        "method",
        "removed %",
        "of all %",
        *(f"{text}: perplexity, rise in nats" for text in texts),
        "per token MiB",
        "pruned in s",
        "peak GiB",
    )
    for layout in dict.fromkeys(row.layout for row in rows[1:]):
        cells = [
            (
                row.method,
                f"{100 * row.ratio:.1f}",
                f"{100 * row.total_ratio:.1f}",
                *(f"{perplexity_text(row.perplexity[text])}  {rise_text(row.rise[text])}" for text in texts),
                f"{row.decode_bytes / 2**20:.1f}",
                f"{row.seconds:.1f}",
                f"{row.peak_bytes / 2**30:.2f}",
            )
            for row in rows
            if row.layout == layout
        ]
        console.print(f"\nlayout {layout}")
        console.print(table(columns, cells, whole=[column for column in columns if not column.endswith("nats")]))
    # Where the update of the kept weights did not help.
    for row in rows:
        if row.fell_back:
            console.print(f"{row.method} at {100 * row.ratio:.1f} %: no update helped in {row.fell_back} modules")
