"""The report's plots, as plotly figures: each one answers a question that a table answers less well."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeprune.report.schema import Report

if TYPE_CHECKING:
    import plotly.graph_objects as go

DENSE, FITTED, LIMIT = "#8a94a6", "#2f6fdb", "#c2410c"
PARTS = {"weights": "#2f6fdb", "cache": "#12a594", "activations": "#e5a000", "buffers": "#b45bcf", "runtime": "#8a94a6"}
SHARES = {"layers": "#2f6fdb", "cache": "#12a594", "head_and_embedding": "#e5a000", "overhead": "#8a94a6"}
MIB = 2**20


def all_plots(report: Report) -> dict[str, tuple[str, str]]:
    """By title: a caption and the plot as HTML that needs plotly.js on the page."""
    plots = {
        "Budget against result": (
            "Each constraint as a share of its limit; left of the line the budget is met.", _budget(report)
        ),
        "Where the bytes are": ("Peak device memory at full context, by part.", _memory(report)),
        "Where the time goes": (f"{report.unprunable} All parts estimated.", _shares(report)),
        "Widths per layer": ("What is left of each layer, in percent of the dense model.", _widths(report)),
    }  # fmt: skip
    if report.search.candidates:
        plots["The search's path"] = (
            f"Predicted and obtained, as a share of the limit. It ended because {report.search.reason}.", _path(report)
        )
    return {title: (caption, _html(figure)) for title, (caption, figure) in plots.items()}


def _html(figure: go.Figure) -> str:
    import plotly.io

    figure.update_layout(
        template="plotly_white", margin={"l": 8, "r": 16, "t": 8, "b": 8}, height=figure.layout.height or 260,
        legend={"orientation": "h", "y": -0.22, "x": 0}, font={"family": "system-ui, sans-serif", "size": 13},
        paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", bargap=0.35,
    )  # fmt: skip
    figure.update_xaxes(automargin=True, zeroline=False)
    figure.update_yaxes(automargin=True, zeroline=False)
    return plotly.io.to_html(
        figure, full_html=False, include_plotlyjs=False, config={"displayModeBar": False, "responsive": True}
    )


def _budget(report: Report) -> go.Figure:
    import plotly.graph_objects as go

    rows = list(reversed(report.budget))
    names = [f"{row.name} ≤ {row.asked}" for row in rows]
    figure = go.Figure()
    for label, color in (("dense", DENSE), ("fitted", FITTED)):
        figures = [getattr(row, label) for row in rows]
        values = [None if f is None else 100 * f.value / row.limit if row.limit else None for f, row in zip(figures, rows, strict=True)]
        spread = [
            100 * (f.high - f.value) / row.limit if f is not None and f.high is not None and row.limit else 0
            for f, row in zip(figures, rows, strict=True)
        ]
        figure.add_bar(
            y=names, x=values, name=label, orientation="h", marker_color=color,
            error_x={"type": "data", "array": spread, "color": "#555"} if any(spread) else None,
            text=[f"{v:.0f} %" if v is not None else "" for v in values], textposition="inside",
        )  # fmt: skip
    figure.add_vline(x=100, line_color=LIMIT, line_dash="dash", annotation_text="limit", annotation_position="top")
    figure.update_layout(height=130 + 80 * len(rows), barmode="group")
    figure.update_xaxes(title="% of the limit", rangemode="tozero")
    return figure


def _stacked(parts: dict[str, str], dense: dict[str, float], fitted: dict[str, float], unit: str) -> go.Figure:
    import plotly.graph_objects as go

    figure = go.Figure()
    for part, color in parts.items():
        figure.add_bar(
            y=["fitted", "dense"], x=[fitted[part], dense[part]], name=part.replace("_", " "), orientation="h",
            marker_color=color, hovertemplate="%{x:.2f} " + unit,
        )  # fmt: skip
    figure.update_layout(barmode="stack", height=240)
    figure.update_xaxes(title=unit)
    return figure


def _memory(report: Report) -> go.Figure:
    dense, fitted = (
        {part: figure.value / MIB for part, figure in side.performance.memory.items()}
        for side in (report.dense, report.fitted)
    )
    return _stacked(PARTS, dense, fitted, "MiB")


def _shares(report: Report) -> go.Figure:
    return _stacked(SHARES, report.dense.latency_shares, report.fitted.latency_shares, "ms per token")


def _widths(report: Report) -> go.Figure:
    import plotly.graph_objects as go

    figure = go.Figure()
    colors = {"query heads": "#12a594", "key/value heads": "#b45bcf", "MLP channels": FITTED}
    for key, color in colors.items():
        values = [
            100 * new[key] / old[key] if old[key] else 0
            for old, new in zip(report.dense.widths, report.fitted.widths, strict=True)
        ]
        figure.add_scatter(
            x=list(range(len(values))), y=values, name=key, mode="lines+markers", line={"shape": "hvh", "color": color}
        )
    figure.update_xaxes(title="layer")
    figure.update_yaxes(title="% kept", range=[0, 106])
    return figure


def _path(report: Report) -> go.Figure:
    import plotly.graph_objects as go

    figure = go.Figure()
    limits = {row.name: row.limit for row in report.budget if row.name != "quality"}
    numbers = [f"{number}" for number in range(1, len(report.search.candidates) + 1)]
    palette = (FITTED, "#12a594", "#b45bcf")
    for (name, limit), color in zip(limits.items(), palette, strict=False):
        for kind, symbol, dash in (("predicted", "circle-open", "dot"), ("obtained", "circle", "solid")):
            values = [100 * getattr(candidate, kind)[name] / limit for candidate in report.search.candidates]
            figure.add_scatter(
                x=numbers, y=values, name=f"{name}, {kind}", mode="lines+markers",
                line={"color": color, "dash": dash}, marker={"symbol": symbol, "size": 10},
            )  # fmt: skip
    figure.add_hline(y=100, line_color=LIMIT, line_dash="dash", annotation_text="limit")
    figure.update_xaxes(title="candidate", type="category")
    figure.update_yaxes(title="% of the limit")
    return figure
