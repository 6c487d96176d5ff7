"""report.html: one self-contained file that opens offline."""

from __future__ import annotations

from pathlib import Path

from edgeprune.budget import STATUS_TEXT, format_bytes, format_ms
from edgeprune.report.plots import all_plots
from edgeprune.report.schema import Figure, Report


def shown(figure: Figure | None) -> str:
    """A figure in its unit, with its interval where it was measured."""
    if figure is None:
        return "–"
    text = _number(figure.value, figure.unit)
    if figure.low is not None and figure.high is not None and figure.high > figure.low:
        text += f" ({_number(figure.low, figure.unit)} to {_number(figure.high, figure.unit)})"
    return text


def _number(value: float, unit: str) -> str:
    if unit == "bytes":
        return format_bytes(value)
    return format_ms(value) if unit == "ms" else f"{value:.1f} %" if unit == "%" else f"{value:.3f}"


def limit_text(value: float, unit: str) -> str:
    return _number(value, unit)


def render_html(report: Report) -> str:
    """The whole page. User text is escaped by the template, and by plotly in the plots' data."""
    from jinja2 import Environment, FileSystemLoader
    from plotly.offline import get_plotlyjs

    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    environment.globals |= {
        "shown": shown, "limit_text": limit_text, "format_bytes": format_bytes, "format_ms": format_ms,
        "status_text": STATUS_TEXT,
    }  # fmt: skip
    template = environment.get_template("template.html.jinja")
    return template.render(r=report, plots=all_plots(report), plotly=get_plotlyjs())
