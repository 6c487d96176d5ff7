"""The page of a comparison of methods: how it was made, one plot for each layout and text, and the table.

It does not know how the rows were obtained.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune import __version__
from edgeprune.files import write_text
from edgeprune.ondevice.budget import format_bytes
from edgeprune.ondevice.machine import processor
from edgeprune.pipeline.provenance import command_line, now, versions
from edgeprune.pipeline.request import SELF, Request
from edgeprune.report.figures import percent_text, perplexity_text, rise_text
from edgeprune.report.svg import PALETTE, Plot, drawing, is_drawable, new_plot, reaches
from edgeprune.report.tables import Table, table
from edgeprune.report.templates import render

if TYPE_CHECKING:
    from edgeprune.pipeline.comparison import Row

MARK = '<meta name="generator" content="edgeprune">'
SYMBOLS = ("o", "s", "D", "P", "X", "^")


def write_page(path: Path, rows: Sequence[Row], made: Mapping[str, str]) -> None:
    """Writes the page at once: a reader finds the old one or the new one, never half of it. Raises WriteError."""
    write_text(path, render_page(rows, made))


def render_page(rows: Sequence[Row], made: Mapping[str, str]) -> str:
    """Returns one self-contained page that opens offline. User text is escaped.

    rows: the dense model first; made: what the page is of, and how it was made, in words by name.
    """
    # A method has the same colour and symbol in all plots.
    dense, *pruned = rows
    layouts = list(dict.fromkeys(row.layout for row in pruned))
    methods = list(dict.fromkeys(row.method for row in pruned))
    with drawing():
        plots = [
            (
                f"{layout}: {text}",
                curves([r for r in pruned if r.layout == layout], text, methods).svg(
                    f"{number}-{place}", f"rise of log perplexity by method, {layout}, on {text}"
                ),
            )
            for number, layout in enumerate(layouts)
            for place, text in enumerate(dense.perplexity)
        ]
    return render(
        "comparison.html.jinja",
        mark=MARK,
        dense=dense,
        made=table(("", ""), made.items()),
        rows=_table(dense, pruned),
        plots=plots,
        perplexity_text=perplexity_text,
    )


def made_of(request: Request, **options: str) -> dict[str, str]:
    """Returns how a comparison was made, in words by name. options: those of `compare` alone, as they were given."""
    own = request.calibration == SELF
    given = ", ".join(map(str, request.evaluate))
    judged = given or ("others that it makes" if own else "documents of it that were held out")
    samples = f"{request.samples}{f' of {request.length} tokens' if request.length else ''}"
    source = "that the dense model makes itself" if own else f"of {request.calibration}"
    command = command_line(request, "compare")
    return {
        "model": request.model,
        "device": f"this machine: {processor()}; nothing was built for another",
        "date": now(),
        "version": ", ".join([f"edgeprune {__version__}", *(f"{name} {of}" for name, of in versions().items())]),
        "seed": str(request.seed),
        "samples": f"{samples} {source} to calibrate on; judged on {judged}",
        "command": " ".join([command, *(f"--{name} {shlex.quote(value)}" for name, value in options.items())]),
    }


def curves(rows: Sequence[Row], text: str, methods: Sequence[str]) -> Plot:
    """Returns the plot of one layout and text: a curve for each method, rise in nats over the share removed; within
    `drawing`."""
    # Draw each method's points by growing ratio, with their intervals.
    plot = new_plot(300 + 10 * len(methods))
    for number, method in enumerate(methods):
        own = sorted((row for row in rows if row.method == method), key=lambda row: row.ratio)
        own = [row for row in own if is_drawable(row.rise[text])]
        if not own:
            continue
        rises = [row.rise[text] for row in own]
        color, marker = PALETTE[number % len(PALETTE)], SYMBOLS[number % len(SYMBOLS)]
        reach = reaches([(low, value, high) for value, low, high in rises])
        across, dash = [100 * row.ratio for row in own], "-" if number < len(PALETTE) else ":"
        look = {"color": color, "marker": marker, "linestyle": dash, "capsize": 3, "elinewidth": 1, "markersize": 6}
        plot.axes.errorbar(across, [value for value, *_ in rises], yerr=reach, label=method, **look)
        for x, row in zip(across, own, strict=True):
            (point,) = plot.axes.plot([x], [row.rise[text][0]], marker, color=color, markersize=6)
            plot.tip(point, f"{method}: {rise_text(row.rise[text])} nats at {percent_text(row.ratio)}, measured")
    plot.axes.set(xlabel="% of attention and MLP parameters removed", ylabel="rise in nats per token, measured")
    # A bad method is a hundred times worse than a good one; but a logarithm drops what is not above zero.
    if all(row.rise[text][0] > 0 for row in rows):
        plot.axes.set_yscale("log", nonpositive="clip")
        plot.axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        plot.axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "25" else "")
    plot.legend(3)
    return plot


def _table(dense: Row, pruned: Sequence[Row]) -> Table:
    """Returns all figures of the methods."""
    texts = list(dense.perplexity)
    of_texts = [head for name in texts for head in (f"perplexity, {name}", f"rise, {name}", f"over default, {name}")]
    return table(
        (
            *("method", "layout", "widths by", "removed", "of all"),
            *of_texts,
            *("moved per token, fp16", "pruned in", "peak memory"),
        ),
        (
            (
                row.method,
                row.layout,
                row.allocation,
                percent_text(row.ratio),
                percent_text(row.total_ratio),
                *(cell for name in texts for cell in _of_text(row, name)),
                format_bytes(row.decode_bytes),
                f"{row.seconds:.1f} s",
                format_bytes(row.peak_bytes),
            )
            for row in pruned
        ),
    )


def _of_text(row: Row, name: str) -> tuple[str, str, str]:
    """Returns perplexity, rise and rise over the default method on one text."""
    over = rise_text(row.over_default[name]) if name in row.over_default else "–"
    return perplexity_text(row.perplexity[name]), rise_text(row.rise[name]), over
