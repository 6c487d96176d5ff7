"""report.html: one self-contained file that opens offline. It adds no figure to the report."""

from __future__ import annotations

from collections import defaultdict

from edgeprune.evaluate.grades import rule_of
from edgeprune.ondevice.budget import format_bytes
from edgeprune.ondevice.experience import READING_RATE, TOKENS_PER_WORD, WORDS_PER_MINUTE
from edgeprune.report.figures import (
    NAMES,
    OUTCOME_LABEL,
    OUTCOME_TEXT,
    alone_text,
    by_source,
    costs_text,
    deciding_text,
    difference_text,
    estimated_sum_text,
    few_pictures_text,
    figure_text,
    levers_text,
    number_text,
    pictures_text,
    recovery_text,
    rivals_text,
    times_text,
    workload_text,
)
from edgeprune.report.plots import all_plots
from edgeprune.report.schema import Report
from edgeprune.report.tables import all_tables
from edgeprune.report.templates import render
from edgeprune.report.verdict import broken_text, cost_text, is_broken, made_text, next_step, verdict


def render_html(report: Report) -> str:
    """Returns the whole page. User text is escaped by the template, and by matplotlib in the plots."""
    none = defaultdict(lambda: None)  # what there is no plot or table of
    return render(
        "report.html.jinja",
        r=report,
        # The words of the verdict and of the notes.
        verdict=verdict(report),
        broken=broken_text(report) if is_broken(report) else "",
        outcome_text=OUTCOME_TEXT[report.outcome],
        outcome_label="broken" if is_broken(report) else OUTCOME_LABEL[report.outcome],
        made=made_text(report),
        cost=cost_text(report),
        next=next_step(report),
        times=times_text(report),
        workload=workload_text(report),
        by_source=by_source(report.fitted.performance.memory),
        levers=levers_text(report.levers) if report.levers else "",
        alone=alone_text(report.levers) if report.levers else "",
        recovery=recovery_text(report.recovery) if report.recovery else "",
        rivals=rivals_text(report),
        deciding=deciding_text(report.budget),
        costs=costs_text(report.search),
        estimated_sum=estimated_sum_text(report),
        room=report.experience["fitted"].room,
        reading={"rate": READING_RATE, "words": WORDS_PER_MINUTE, "tokens": TOKENS_PER_WORD},
        grades=rule_of(report.quality.metric),
        # Tables and plots by name, and what formats in the template.
        tables=none | all_tables(report),
        plots=none | all_plots(report),
        names=none | NAMES,
        figure_text=figure_text,
        number_text=number_text,
        format_bytes=format_bytes,
        pictures_text=pictures_text,
        difference_text=difference_text,
        few_pictures_text=few_pictures_text,
    )
