"""fleet.html: a fleet as one table of models by targets; one self-contained file that opens offline.

It adds no figure to the document of the fleet.
"""

from __future__ import annotations

from urllib.parse import quote

from edgeprune.report.figures import OUTCOME_LABEL, number_text
from edgeprune.report.fleet import Fleet, Row
from edgeprune.report.templates import render

FIGURES = {"memory": "memory", "prefill": "first token", "decode": "per token"}


def render_fleet(fleet: Fleet, name: str) -> str:
    """Returns the whole page. name: of the fleet. User text is escaped by the template."""
    return render(
        "fleet.html.jinja",
        f=fleet,
        name=name,
        cells={(row.model, row.target): row for row in fleet.cells},
        figures=FIGURES,
        label=label_of,
        state=state_of,
        number_text=number_text,
        link=lambda row: f"{quote(row.bundle)}/report.html",
        best={target: fleet.best(target) for target in fleet.targets},
        left=sum(not row.has_ended for row in fleet.cells),
    )


def state_of(row: Row) -> str:
    """Returns the verdict of a cell in one word for a style: met, missed, noisy, failed, or waiting."""
    if not row.has_ended:
        return "waiting"
    if row.status is None:
        return "failed"
    if row.status == "met":
        return "broken" if row.grade == "broken" else "met"
    return "missed" if row.status in ("missed", "out_of_reach") else "noisy"


def label_of(row: Row) -> str:
    """Returns the verdict of a cell in words."""
    if row.status is None:
        return "failed" if row.has_ended else "waiting"
    return "broken" if row.grade == "broken" else OUTCOME_LABEL[row.status]
