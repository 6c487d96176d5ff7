"""The page of a comparison of methods: one plot for each layout and text, and the table.

It does not know how the rows were obtained.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune.files import write_text
from edgeprune.ondevice.budget import format_bytes
from edgeprune.report.figures import perplexity_text, rise_text
from edgeprune.report.plots import PALETTE, plot_html
from edgeprune.report.templates import render

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from edgeprune.pipeline.comparison import Row

MARK = '<meta name="generator" content="edgeprune">'
SYMBOLS = ("circle", "square", "diamond", "cross", "x", "triangle-up")


def write_page(path: Path, rows: Sequence[Row]) -> None:
    """Writes the page at once: a reader finds the old one or the new one, never half of it. Raises WriteError."""
    write_text(path, render_page(rows))


def render_page(rows: Sequence[Row]) -> str:
    """Returns one self-contained page that opens offline. The dense model is the first row. User text is escaped."""
    from plotly.offline import get_plotlyjs

    # Draw a plot for each layout and text.
    dense, *pruned = rows
    layouts = list(dict.fromkeys(row.layout for row in pruned))
    methods = list(dict.fromkeys(row.method for row in pruned))  # a method has the same colour and symbol in all plots
    plots = [
        (
            f"{layout}: {text}",
            plot_html(f"{number}-{place}", _curves([r for r in pruned if r.layout == layout], text, methods)),
        )
        for number, layout in enumerate(layouts)
        for place, text in enumerate(dense.perplexity)
    ]
    # Fill in the template.
    return render(
        "comparison.html.jinja",
        mark=MARK,
        dense=dense,
        rows=pruned,
        plots=plots,
        plotly=get_plotlyjs(),
        rise_text=rise_text,
        perplexity_text=perplexity_text,
        format_bytes=format_bytes,
    )


def _curves(rows: Sequence[Row], text: str, methods: Sequence[str]) -> go.Figure:
    """Returns the plot of one layout and text: a curve for each method, rise in nats over the share removed."""
    import plotly.graph_objects as go

    # Draw each method's points by growing ratio, with their intervals.
    figure = go.Figure()
    for number, method in enumerate(methods):
        own = sorted((row for row in rows if row.method == method), key=lambda row: row.ratio)
        if not own:
            continue
        rises = [row.rise[text] for row in own]
        figure.add_scatter(
            x=[100 * row.ratio for row in own],
            y=[value for value, _, _ in rises],
            name=escape(method),
            mode="lines+markers",
            line_color=PALETTE[number % len(PALETTE)],
            line_dash="solid" if number < 5 else "dot",
            marker_symbol=SYMBOLS[number % len(SYMBOLS)],
            error_y={
                "type": "data",
                "array": [high - value for value, _, high in rises],
                "arrayminus": [value - low for value, low, _ in rises],
                "thickness": 1,
                "width": 3,
            },
            hovertemplate="%{y:.3f} nats at %{x:.1f} %<extra>" + escape(method) + "</extra>",
        )
    # Label the axes.
    figure.update_layout(height=380)
    figure.update_xaxes(title_text="% of attention and MLP parameters removed")
    # A bad method is a hundred times worse than a good one; but a logarithm drops what is not above zero.
    scale = "log" if all(row.rise[text][0] > 0 for row in rows) else "linear"
    figure.update_yaxes(title_text="rise of log perplexity, nats per token", type=scale)
    return figure
