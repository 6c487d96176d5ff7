"""A fleet as the command line shows it, while it runs and at its end. It adds no figure to the document."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from edgeprune.report.figures import number_text
from edgeprune.report.fleet import Fleet, Row
from edgeprune.report.fleet_page import FIGURES, label_of, state_of
from edgeprune.report.terminal import styled, table

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

STYLES = {"met": "green", "noisy": "yellow", "missed": "red", "failed": "red", "broken": "red", "waiting": "dim"}
FIRST = ("failed", "broken", "missed", "noisy", "met", "waiting")  # behind the cells that run, where not all are shown


def fleet_table(fleet: Fleet, running: Mapping[int, str], most: int) -> Table:
    """Returns the table of a fleet in at most so many rows; where not all fit, those that run stand first, then those
    that failed. running: what the cells do that run, by their places."""
    places = list(range(len(fleet.cells)))
    if len(places) > most:
        places.sort(key=lambda place: -1 if place in running else FIRST.index(state_of(fleet.cells[place])))
    rows = [_cells(fleet.cells[place], running.get(place)) for place in places[:most]]
    shown = table(("model", "target", "state", *FIGURES.values(), "perplexity"), rows)
    ended = sum(row.has_ended for row in fleet.cells)
    hidden = f", {len(places) - most} are not shown" if len(places) > most else ""
    shown.caption = styled(f"{ended} of {len(fleet.cells)} cells have ended, {len(running)} run{hidden}", "dim")
    return shown


def _cells(row: Row, doing: str | None) -> tuple[str | Text, ...]:
    state = styled(doing, "cyan") if doing is not None else styled(label_of(row), STYLES[state_of(row)])
    figures = [row.figure(name) for name in FIGURES]
    words = ["" if one is None else f"{number_text(one.value, one.unit)} ({one.source})" for one in figures]
    rise = "" if row.rise_percent is None else number_text(row.rise_percent, "%")
    return row.model, row.target, state, *words, rise
