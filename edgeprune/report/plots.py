"""The report's plots, as HTML that needs plotly.js on the page: each answers what a table answers less well.

They add no figure to the report. Units differ between constraints, so they are drawn as shares of their limits and
labelled in their units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from math import isfinite
from typing import TYPE_CHECKING, Any

from edgeprune.report.figures import figure_text, number_text, shorten
from edgeprune.report.quality import Answers
from edgeprune.report.schema import BROKEN_PERCENT, DEGRADED_PERCENT, Constraint, Figure, Module, Report

if TYPE_CHECKING:
    import plotly.graph_objects as go

# Distinguishable with any colour vision, and on a light and a dark page.
DENSE, FITTED, LIMIT = "#9aa4b5", "#3b78e7", "#d9480f"
LIMIT_LINE = {"color": LIMIT, "dash": "dash", "width": 2}
PALETTE = (FITTED, "#12a594", "#e5a000", "#b45bcf", DENSE)
MIB = 2**20


def all_plots(report: Report) -> dict[str, str]:
    """Returns the plots as HTML by name, without those that have nothing to show: a limit, a candidate, a pruned
    module."""
    plots = {
        "budget": _budget(report.budget),
        "quality": _quality(report),
        "answers": _answers(report.quality.answers),
        "memory": _memory(report),
        "latency": _latency(report),
        "path": _path(report),
        "widths": _widths(report.dense.widths, report.fitted.widths),
        "errors": _errors(report.modules),
    }
    return {name: plot_html(name, figure) for name, figure in plots.items() if figure is not None}


def is_uniform(widths: Sequence[Mapping[str, int]]) -> bool:
    """Returns whether all layers have the same widths."""
    return all(layer == widths[0] for layer in widths)


def plot_html(name: str, figure: go.Figure) -> str:
    """Returns a figure as HTML in the pages' style; plotly escapes what could end the script that holds the data.

    name: unique on the page; the element's id is `plot-NAME`.
    """
    import plotly.io

    # All plots share their margins, fonts and colours, and none can be zoomed or dragged.
    figure.update_layout(
        template="none",
        margin={"l": 8, "r": 20, "t": 34, "b": 14},
        dragmode=False,
        legend={"orientation": "h", "y": 1, "yanchor": "bottom", "x": 0},
        font={"family": 'system-ui, -apple-system, "Segoe UI", sans-serif', "size": 13, "color": "#5b6678"},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        bargap=0.3,
        bargroupgap=0.08,
    )
    axis = {"automargin": True, "zeroline": False, "gridcolor": "#e3e7ee", "fixedrange": True, "title_font_size": 12}
    figure.update_xaxes(**axis)
    figure.update_yaxes(ticksuffix=" ", **axis)
    # plotly.js stands once on the page, not in each plot.
    return plotly.io.to_html(
        figure,
        full_html=False,
        include_plotlyjs=False,
        div_id=f"plot-{name}",
        config={"displayModeBar": False, "responsive": True},
    )


def _share(figure: Figure | None, limit: float) -> float | None:
    """Returns a figure in % of its limit; None where either is missing or the figure is not finite."""
    return None if figure is None or not limit or not isfinite(figure.value) else 100 * figure.value / limit


def _budget(constraints: Sequence[Constraint]) -> go.Figure | None:
    """Returns the bars of both models in % of each limit; None where there is no limit above 0."""
    import plotly.graph_objects as go

    # Bars are drawn from the bottom up, so the first constraint comes last.
    rows = [row for row in reversed(constraints) if row.limit]
    if not rows:
        return None
    names = [
        f"{escape(f'{row.name} {shorten(row.asked, 12)}')}\N{NO-BREAK SPACE}<br>{row.fitted.source}" for row in rows
    ]
    # Draw a bar of each model for each constraint, labelled in the constraint's own unit.
    figure = go.Figure()
    for side, color in (("fitted", FITTED), ("dense", DENSE)):
        figures: list[Figure | None] = [getattr(row, side) for row in rows]
        shares = [_share(f, row.limit) for f, row in zip(figures, rows, strict=True)]
        labels = ["" if f is None else number_text(f.value, f.unit) for f in figures]
        hover = ["" if f is None else f"{figure_text(f)}, {f.source}" for f in figures]
        figure.add_bar(
            y=names,
            x=shares,
            name=side,
            orientation="h",
            marker_color=color,
            text=labels,
            textposition="auto",
            insidetextanchor="start",
            textangle=0,
            error_x=_interval(figures, rows),
            hovertext=hover,
            hovertemplate="%{hovertext}: %{x:.1f} % of the limit<extra>" + side + "</extra>",
        )
    # Mark the limit.
    figure.add_vline(x=100, line=LIMIT_LINE, name="limit", showlegend=True)
    figure.update_layout(height=110 + 76 * len(rows), barmode="group", legend_traceorder="reversed")
    figure.update_xaxes(title_text="% of the limit", rangemode="tozero")
    return figure


def _interval(figures: Sequence[Figure | None], rows: Sequence[Constraint]) -> dict[str, Any] | None:
    """Returns error bars in % of the limit; plotly takes them as distances from the value. None without intervals."""
    up, down = (
        [
            0.0 if f is None or (bound := getattr(f, name)) is None else 100 * abs(bound - f.value) / row.limit
            for f, row in zip(figures, rows, strict=True)
        ]
        for name in ("high", "low")
    )
    if not any(up + down):
        return None
    return {"type": "data", "array": up, "arrayminus": down, "color": "#5b6678", "thickness": 1.5, "width": 4}


def _stacked(dense: Mapping[str, float], fitted: Mapping[str, float], unit: str) -> go.Figure:
    """Returns a stacked bar of each model. dense, fitted: values in the unit, by the parts of the bar."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for part, color in zip(dense, PALETTE, strict=False):
        figure.add_bar(
            y=["fitted", "dense"],
            x=[fitted[part], dense[part]],
            name=part.replace("_", " "),
            orientation="h",
            marker_color=color,
            hovertemplate="%{x:.2f} " + unit,
        )
    figure.update_layout(barmode="stack", height=250, margin_t=56, legend_traceorder="normal")
    figure.update_xaxes(title_text=unit)
    return figure


def _memory(report: Report) -> go.Figure:
    dense, fitted = (
        {part: figure.value / MIB for part, figure in side.performance.memory.items()}
        for side in (report.dense, report.fitted)
    )
    return _stacked(dense, fitted, "MiB")


def _latency(report: Report) -> go.Figure:
    return _stacked(report.dense.latency_shares, report.fitted.latency_shares, "ms per token, estimated")


def _quality(report: Report) -> go.Figure | None:
    """Returns the rise of perplexity on each text with its interval, against the grades' thresholds.

    None where every rise is beyond floating point.
    """
    import plotly.graph_objects as go

    texts = [text for text in reversed(report.quality.texts) if isfinite(text.rise_percent + text.high_percent)]
    if not texts:
        return None
    # Draw a point for each text with its interval.
    figure = go.Figure()
    figure.add_scatter(
        # The position keeps texts of the same shortened name apart; labels are set on the axis.
        x=[text.rise_percent for text in texts],
        y=list(range(len(texts))),
        mode="markers",
        marker={"size": 12, "color": FITTED},
        name="fitted",
        showlegend=False,
        error_x={
            "type": "data",
            "array": [text.high_percent - text.rise_percent for text in texts],
            "arrayminus": [text.rise_percent - text.low_percent for text in texts],
            "color": FITTED,
            "width": 6,
        },
        text=[number_text(text.rise_percent, "%") for text in texts],
        hovertemplate="%{text}<extra></extra>",
    )
    # Mark the thresholds that lie within the range of the axis.
    right = 1.12 * max(DEGRADED_PERCENT, *(text.high_percent for text in texts))
    left = min(0.0, *(1.12 * text.low_percent for text in texts))
    for grade, start, dash in (("degraded", DEGRADED_PERCENT, "dot"), ("broken", BROKEN_PERCENT, "dash")):
        if start < right:
            line = {"color": LIMIT, "dash": dash, "width": 2}
            figure.add_vline(x=start, line=line, name=f"{grade} from {start:g} %", showlegend=True)
    # Label the axes.
    figure.update_layout(height=120 + 40 * len(texts), showlegend=True)
    figure.update_xaxes(title_text="rise of perplexity, %", range=[left, right])
    figure.update_yaxes(
        tickvals=list(range(len(texts))),
        ticktext=[escape(shorten(text.name, 22)) for text in texts],
        range=[-0.7, len(texts) - 0.3],
        showgrid=False,
    )
    return figure


def _answers(answers: Answers | None) -> go.Figure | None:
    """Returns how many answers are still the dense model's, by the number of tokens from the first."""
    import plotly.graph_objects as go

    if answers is None:
        return None
    # Draw the share of identical answers for each number of tokens, with its interval.
    steps = answers.identical
    figure = go.Figure()
    figure.add_scatter(
        x=[str(step.tokens) for step in steps],
        y=[step.percent for step in steps],
        mode="lines+markers",
        marker={"size": 11, "color": FITTED},
        line={"color": FITTED, "width": 1},
        showlegend=False,
        error_y={
            "type": "data",
            "array": [step.high_percent - step.percent for step in steps],
            "arrayminus": [step.percent - step.low_percent for step in steps],
            "color": FITTED,
            "width": 5,
        },
        text=[f"{step.same} of {step.answers}" for step in steps],
        hovertemplate="%{text} identical for %{x} tokens<extra></extra>",
    )
    # Label the axes.
    figure.update_layout(height=220)
    figure.update_xaxes(title_text="first tokens of the answer", type="category", showgrid=False)
    figure.update_yaxes(title_text="identical, %", range=[-5, 105])
    return figure


def _widths(dense: Sequence[Mapping[str, int]], fitted: Sequence[Mapping[str, int]]) -> go.Figure:
    """Returns the share of heads and channels kept in each layer. dense, fitted: widths by layer and name."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for key, color in zip(dense[0], PALETTE, strict=False):
        kept_percent = [100 * new[key] / old[key] if old[key] else 0.0 for old, new in zip(dense, fitted, strict=True)]
        figure.add_scatter(
            x=list(range(len(kept_percent))),
            y=kept_percent,
            name=escape(key),
            mode="lines+markers",
            line={"shape": "hvh", "color": color},
            text=[f"{new[key]} of {old[key]}" for old, new in zip(dense, fitted, strict=True)],
            hovertemplate="layer %{x}: %{text}",
        )
    figure.update_layout(height=300, margin_t=56)
    figure.update_xaxes(title_text="layer")
    figure.update_yaxes(title_text="% kept", range=[0, 106])
    return figure


def _errors(modules: Sequence[Module]) -> go.Figure | None:
    """Returns the distance from the dense stream behind every pruned module, by layer; None where none was pruned."""
    import plotly.graph_objects as go

    # Draw two curves for each kind of module: the error without the update and with it.
    figure = go.Figure()
    for kind, color in zip(("attention", "mlp"), PALETTE, strict=False):
        pruned = [m for m in modules if m.kind == kind and m.kept < m.of and m.error_before is not None]
        if not pruned:
            continue
        for name, label, dash in (("error_before", "without update", "dot"), ("error_after", "with", "solid")):
            figure.add_scatter(
                x=[m.layer for m in pruned],
                y=[getattr(m, name) for m in pruned],
                name=f"{kind}, {label}",
                mode="lines+markers",
                line={"color": color, "dash": dash},
                hovertemplate="layer %{x}: %{y:.3g}",
            )
    if not figure.data:
        return None
    # Label the axes.
    figure.update_layout(height=300, margin_t=56)
    figure.update_xaxes(title_text="layer")
    figure.update_yaxes(title_text="distance from the dense stream", rangemode="tozero")
    return figure


def _path(report: Report) -> go.Figure | None:
    """Returns the way from the dense model over the candidates, in the order in which they were tried.

    None where nothing was searched.
    """
    import plotly.graph_objects as go

    candidates = report.search.candidates
    limits = [row for row in report.budget if row.name != "quality"]
    if not limits or not candidates:
        return None
    # Draw two curves for each limit: what was predicted of the candidates and what was obtained.
    figure = go.Figure()
    names = ["dense", *(str(number) for number in range(1, len(candidates) + 1))]
    for row, color in zip(limits, PALETTE, strict=False):
        for kind, symbol, dash in (("predicted", "circle-open", "dot"), ("obtained", "circle", "solid")):
            values = [getattr(candidate, kind)[row.name] for candidate in candidates]
            if kind == "obtained" and row.dense is not None:
                values.insert(0, row.dense.value)
            label = kind if kind == "predicted" else row.fitted.source
            figure.add_scatter(
                x=names[-len(values) :],
                y=[100 * value / row.limit for value in values],
                name=f"{row.name}, {label}",
                mode="lines+markers",
                line={"color": color, "dash": dash},
                marker={"symbol": symbol, "size": 11},
                text=[number_text(value, row.unit) for value in values],
                hovertemplate="%{text} (%{y:.1f} %)",
            )
    # Mark the limit and the chosen candidate.
    figure.add_hline(y=100, line=LIMIT_LINE, name="limit", showlegend=True)
    for index, candidate in enumerate(candidates):
        if candidate.chosen:
            figure.add_annotation(
                x=names[1 + index],
                y=min(candidate.obtained[row.name] / row.limit for row in limits) * 100,
                text="chosen",
                yanchor="top",
                yshift=-8,
                showarrow=False,
            )
    # Label the axes.
    figure.update_layout(height=300, margin_t=56)
    figure.update_xaxes(
        title_text="candidate", type="category", categoryorder="array", categoryarray=names, showgrid=False
    )
    figure.update_yaxes(title_text="% of the limit")
    return figure
