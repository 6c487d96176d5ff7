"""frontier.html: the ladder as a plot and a table to pick from; one self-contained file that opens offline.

It adds no figure to the document of the frontier.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import asinh, isfinite
from typing import TYPE_CHECKING, Any

from edgeprune.report.figures import figure_text, number_text, rise_interval, share_text, worst_agreement
from edgeprune.report.frontier import Dense, Frontier, Rung, pick_command
from edgeprune.report.plots import DENSE, LIMIT, plot_html
from edgeprune.report.schema import BROKEN_PERCENT, DEGRADED_PERCENT, Figure, Text
from edgeprune.report.templates import render

if TYPE_CHECKING:
    import plotly.graph_objects as go

# Colour and shape both stand for the grade; distinguishable with any colour vision, on a light and a dark page.
MARKERS = {
    "dense": (DENSE, "square"),
    "intact": ("#3b78e7", "circle"),
    "degraded": ("#e5a000", "diamond"),
    "broken": (LIMIT, "x"),
}
PATH = "path"
MIB = 2**20
COLUMNS = {  # field: head of its column in the table
    "decode": "per token",
    "decode_ratio": "of dense",
    "tokens_per_second": "tokens/s",
    "prefill": "first token",
    "memory": "memory",
}
AXES = {  # field: text of the button, title of the axis, the figure's value at 1 on the axis
    "decode": ("per token", "ms per token", 1),
    "tokens_per_second": ("tokens/s", "tokens/s", 1),
    "memory": ("memory", "peak memory, MiB", MIB),
    "prefill": ("first token", "ms to the first token", 1),
}
TICKS = (2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)  # percent, below and above 0
COARSE_TICKS = tuple(10**power for power in range(1, 300, 2))  # where a rise is beyond those


def render_frontier(frontier: Frontier, bundle: str) -> str:
    """Returns the whole page. bundle: the folder's name, for the commands. User text is escaped."""
    from plotly.offline import get_plotlyjs

    # Fill in the template; rungs whose rise is beyond floating point are named instead of drawn.
    drawn = [rung for rung in frontier.rungs if _is_drawn(rung)]
    return render(
        "frontier.html.jinja",
        f=frontier,
        bundle=bundle,
        plotly=get_plotlyjs(),
        plot=plot_html("frontier", frontier_plot(frontier)),
        axes=frontier_axes(frontier),
        undrawn=[rung.index for rung in frontier.rungs if rung not in drawn],
        pick_command=pick_command,
        number_text=number_text,
        split=split,
        interval_of=interval_of,
        rise_of=rise_of,
        columns=COLUMNS,
        agreement_of=agreement_of,
        agreements=any(agreement_of(rung) for rung in frontier.rungs),
        degraded_percent=DEGRADED_PERCENT,
        broken_percent=BROKEN_PERCENT,
        intact=frontier.fastest(("intact",)),
        usable=frontier.fastest(("intact", "degraded")),
    )


def split(figure: Figure) -> tuple[str, str]:
    """Returns a figure and its interval, for two lines; the interval is empty where there is none."""
    value, _, interval = figure_text(figure).partition(" (")
    return value, interval.removesuffix(")")


def agreement_of(rung: Rung) -> tuple[str, str] | None:
    """Returns how often the likeliest next token is the dense model's, on the worst text, and the interval."""
    if (agreement := worst_agreement(rung.texts)) is None:
        return None
    share, _, interval = share_text(agreement).partition(" (")
    return share, interval.removesuffix(")")


def interval_of(rise: Rung | Text) -> str:
    """Returns the interval of a rise of perplexity; empty where there is none."""
    return (rise_interval(rise) or "").replace(" % to", " to")


def rise_of(rise: Rung | Text) -> str:
    """Returns a rise of perplexity with its interval, where there is one."""
    interval = interval_of(rise)
    return number_text(rise.rise_percent, "%") + (f" ({interval})" if interval else "")


def frontier_plot(frontier: Frontier) -> go.Figure:
    """Returns the plot of the rise of perplexity over the time per token; `frontier_axes` puts other quantities
    across.

    The vertical axis is asinh(rise / 5 %): linear where quality is intact, logarithmic beyond, so that a destroyed
    model does not flatten the ones to pick from. Rungs of a rise beyond floating point are left out.
    """
    import plotly.graph_objects as go

    # Draw the way down from the dense model as a line, and the points by grade.
    figure = go.Figure()
    for name, points in _traces(frontier):
        across = {"x": _across(points, "decode"), "y": [_height(_rise(point)[1]) for point in points]}
        if name == PATH:
            style: dict[str, Any] = {"mode": "lines", "line": {"color": DENSE, "width": 1, "dash": "dot"}}
            figure.add_scatter(**across, **style, hoverinfo="skip", error_x={"visible": False})
            continue
        color, symbol = MARKERS[name]
        figure.add_scatter(
            **across,
            **_bars(points),
            mode="markers+text",
            name=name,
            marker={"color": color, "symbol": symbol, "size": [13] * len(points), "opacity": 1},
            text=[str(point.index) if isinstance(point, Rung) else "dense" for point in points],
            textposition="bottom center" if name == "dense" else "top right",
            customdata=[point.index for point in points if isinstance(point, Rung)] or None,
            hovertext=[_hover(point) for point in points],
            hovertemplate="%{hovertext}<extra></extra>",
        )
    # Draw the grades' thresholds and label the axes.
    _grade_lines(figure, [rung for rung in frontier.rungs if _is_drawn(rung)])
    figure.update_xaxes(title_text=_title(frontier, "decode"))
    figure.update_layout(height=430, hoverlabel={"align": "left"}, showlegend=False)
    return figure


def frontier_axes(frontier: Frontier) -> dict[str, tuple[str, dict[str, Any], dict[str, Any]]]:
    """Returns what may stand across, by field: the button's words, and the data and layout for Plotly.update."""
    axes = {}
    for field, (label, *_) in AXES.items():
        traces = [points for _, points in _traces(frontier)]
        reaches = [_reach(points, field) for points in traces]
        data = {
            "x": [_across(points, field) for points in traces],
            "error_x.array": [up for up, _ in reaches],
            "error_x.arrayminus": [down for _, down in reaches],
        }
        axes[field] = (label, data, {"xaxis.title.text": _title(frontier, field)})
    return axes


def _traces(frontier: Frontier) -> list[tuple[str, list[Dense | Rung]]]:
    """Returns the plot's traces by name: the way down, the dense model, the rungs of each grade."""
    rungs = [rung for rung in frontier.rungs if _is_drawn(rung)]
    graded = {grade: [rung for rung in rungs if rung.grade == grade] for grade in ("intact", "degraded", "broken")}
    return [
        (PATH, [frontier.dense, *rungs]),
        ("dense", [frontier.dense]),
        *((grade, own) for grade, own in graded.items() if own),
    ]


def _is_drawn(rung: Rung) -> bool:
    return isfinite(rung.rise_percent + rung.low_percent + rung.high_percent)


def _rise(point: Dense | Rung) -> tuple[float, float, float]:
    """Returns low, value and high of the rise in percent; the dense model's rise is 0 by definition."""
    return (point.low_percent, point.rise_percent, point.high_percent) if isinstance(point, Rung) else (0.0, 0.0, 0.0)


def _height(percent: float) -> float:
    """Returns where a rise in percent stands on the vertical axis."""
    return asinh(percent / DEGRADED_PERCENT)


def _across(points: Sequence[Dense | Rung], field: str) -> list[float | None]:
    """Returns the figure of each point in the axis's units; None where it has none."""
    figures: list[Figure | None] = [getattr(point, field) for point in points]
    return [None if figure is None else figure.value / AXES[field][2] for figure in figures]


def _reach(points: Sequence[Dense | Rung], field: str) -> tuple[list[float], list[float]]:
    """Returns how far the interval of each figure reaches above and below it, in the axis's units."""
    figures: list[Figure | None] = [getattr(point, field) for point in points]
    up, down = (
        [
            0.0 if figure is None or (bound := getattr(figure, name)) is None else abs(bound - figure.value)
            for figure in figures
        ]
        for name in ("high", "low")
    )
    return [value / AXES[field][2] for value in up], [value / AXES[field][2] for value in down]


def _bars(points: Sequence[Dense | Rung]) -> dict[str, Any]:
    """Returns the error bars of a trace: across for the time per token, upright for the rise."""
    style = {"type": "data", "color": "#5b6678", "thickness": 1.2, "width": 4}
    rises = [tuple(map(_height, _rise(point))) for point in points]
    up, down = _reach(points, "decode")
    return {
        "error_x": {**style, "array": up, "arrayminus": down},
        "error_y": {
            **style,
            "array": [high - value for _, value, high in rises],
            "arrayminus": [value - low for low, value, _ in rises],
        },
    }


def _hover(point: Dense | Rung) -> str:
    """Returns the text that appears over a point: its figures, each with its source."""
    named = {label: getattr(point, field) for field, (label, *_) in AXES.items()}
    lines = [f"{label} {figure_text(figure)}, {figure.source}" for label, figure in named.items() if figure is not None]
    if isinstance(point, Rung):
        lines += [
            f"{100 * point.ratio:.1f} % of attention and MLP pruned",
            f"perplexity {rise_of(point)}, measured: {point.grade}",
        ]
        if agreement := agreement_of(point):
            lines.append(f"the dense model's next token at {agreement[0]}, measured")
    title = f"rung {point.index}" if isinstance(point, Rung) else "dense"
    return "<br>".join([f"<b>{title}</b>", *lines])


def _title(frontier: Frontier, field: str) -> str:
    """Returns the title of the axis with the sources of the figures drawn: no figure stands without one."""
    sources = frontier.sources(field)
    mixed = "; point at one to see its own" if len(sources) > 1 else ""
    return f"{AXES[field][1]}, {' and '.join(sources)}{mixed}"


def _grade_lines(figure: go.Figure, rungs: Sequence[Rung]) -> None:
    """Draws the thresholds where a model stops being intact and where it is broken; both are always in sight."""
    # Choose the range of the axis so that it holds all rungs and both thresholds.
    lowest = min((rung.low_percent for rung in rungs), default=0.0)
    highest = max((rung.high_percent for rung in rungs), default=0.0)
    bottom = min(_height(lowest), 0.0) - 0.5
    top = max(_height(highest), _height(BROKEN_PERCENT)) + 0.5
    # Draw a line for each threshold and shade what lies beyond the second.
    for grade, start, dash in (("degraded", DEGRADED_PERCENT, "dot"), ("broken", BROKEN_PERCENT, "dash")):
        figure.add_hline(
            y=_height(start),
            line={"color": MARKERS[grade][0], "dash": dash, "width": 2},
            layer="below",
            annotation={
                "text": f"{grade} from {start:g} %",
                "x": 0,
                "xanchor": "left",
                "yanchor": "bottom",
                "showarrow": False,
            },
        )
    figure.add_hrect(y0=_height(BROKEN_PERCENT), y1=top, fillcolor=LIMIT, opacity=0.09, line_width=0, layer="below")
    # Mark round percentages at their places on the asinh axis.
    steps = TICKS if highest < 2 * TICKS[-1] else COARSE_TICKS
    ticks = [value for step in (0, *steps) for value in {-step, step} if bottom <= _height(value) <= top]
    figure.update_yaxes(
        title={"text": "rise of perplexity, measured", "standoff": 14},
        range=[bottom, top],
        tickvals=[_height(value) for value in ticks],
        ticktext=[f"{value:+g} %" if value else "0" for value in ticks],
    )
