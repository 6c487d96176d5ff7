"""report.html: one self-contained file that opens offline. It adds no figure to the report."""

from __future__ import annotations

from edgeprune.ondevice.budget import format_bytes
from edgeprune.ondevice.experience import READING_RATE, TOKENS_PER_WORD, WORDS_PER_MINUTE
from edgeprune.report.figures import (
    OUTCOME_LABEL,
    OUTCOME_TEXT,
    alone_text,
    by_source,
    costs_text,
    deciding_text,
    difference_text,
    few_pictures_text,
    figure_text,
    interval_text,
    levers_text,
    number_text,
    picture_room_text,
    pictures_text,
    reading_text,
    rise_interval,
    room_text,
    share_text,
    workload_text,
    worst_agreement,
)
from edgeprune.report.plots import all_plots, is_uniform
from edgeprune.report.schema import BROKEN_PERCENT, DEGRADED_PERCENT, Report
from edgeprune.report.templates import render

# The template formats with the words that the terminal uses too.
_WORDS = {
    "figure_text": figure_text,
    "number_text": number_text,
    "format_bytes": format_bytes,
    "by_source": by_source,
    "rise_interval": rise_interval,
    "reading_text": reading_text,
    "room_text": room_text,
    "share_text": share_text,
    "interval_text": interval_text,
    "difference_text": difference_text,
    "few_pictures_text": few_pictures_text,
    "pictures_text": pictures_text,
    "picture_room_text": picture_room_text,
    "workload_text": workload_text,
    "worst_agreement": worst_agreement,
    "deciding_text": deciding_text,
    "levers_text": levers_text,
    "alone_text": alone_text,
    "costs_text": costs_text,
    "reading": {"rate": READING_RATE, "words": WORDS_PER_MINUTE, "tokens": TOKENS_PER_WORD},
    "outcome_text": OUTCOME_TEXT,
    "outcome_label": OUTCOME_LABEL,
    "degraded_percent": DEGRADED_PERCENT,
    "broken_percent": BROKEN_PERCENT,
}


def render_html(report: Report) -> str:
    """Returns the whole page. User text is escaped by the template, and by plotly in the plots' data."""
    from plotly.offline import get_plotlyjs

    plots, uniform = all_plots(report), is_uniform(report.fitted.widths)
    return render("template.html.jinja", r=report, plots=plots, plotly=get_plotlyjs(), uniform=uniform, **_WORDS)
