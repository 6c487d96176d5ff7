"""fleet.json: the cells of a fleet with their verdicts and figures, and the best model for each target.

It shows what the reports of the cells' bundles hold, and measures nothing.
"""

from __future__ import annotations

from pydantic import Field

from edgeprune.report.base import Figure, Source, Strict
from edgeprune.report.schema import Grade, Outcome, Report

FLEET_FILE, FLEET_PAGE = "fleet.json", "fleet.html"
FAILED = 4  # exit code of a fleet of which a cell failed


class Row(Strict):
    """One cell of a fleet."""

    model: str
    target: str
    status: Outcome | None = Field(
        None,
        description="of the report; out_of_reach without one: below the floor; none: the cell failed, or has not ended",
    )
    exit_code: int | None = Field(None, description="as of `edgeprune fit`; none: it has not ended")
    reason: str | None = Field(None, description="why it failed")
    bundle: str | None = Field(None, description="in the fleet's folder")
    headline: str | None = None
    memory_bytes: float | None = None
    prefill_ms: float | None = None
    decode_ms: float | None = None
    memory_source: Source | None = None
    prefill_source: Source | None = None
    decode_source: Source | None = None
    rise_percent: float | None = Field(None, description="of perplexity, measured, on the worst text")
    grade: Grade | None = None
    parameters: int | None = None
    seconds: float | None = Field(None, description="wall time of the attempt that ended")
    node: str | None = Field(None, description="where that ran")

    @property
    def has_ended(self) -> bool:
        return self.exit_code is not None

    def figure(self, name: str) -> Figure | None:
        """Returns memory, prefill or decode with its unit and source; None: the cell has none."""
        unit = "bytes" if name == "memory" else "ms"
        value, source = getattr(self, f"{name}_{unit}"), getattr(self, f"{name}_source")
        return None if value is None else Figure(value=value, unit=unit, source=source, device=self.target)


class Fleet(Strict):
    """The whole document."""

    edgeprune: str = Field(description="version")
    created: str = Field(description="UTC, ISO 8601")
    seconds: float = Field(description="wall time of the fleet so far")
    cells: list[Row]

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(row.model for row in self.cells))

    @property
    def targets(self) -> list[str]:
        return list(dict.fromkeys(row.target for row in self.cells))

    def best(self, target: str) -> Row | None:
        """Returns the cell of a target that met the budget and lost least: its rise of perplexity over its own dense
        model is the smallest. None: no model did."""
        met = [row for row in self.cells if row.target == target and row.status == "met" and row.grade != "broken"]
        return min(met, key=lambda row: row.rise_percent or 0.0, default=None)

    @property
    def exit_code(self) -> int:
        """Returns 0 where every cell met its budget, FAILED where some failed, otherwise 3."""
        codes = {row.exit_code for row in self.cells}
        if any(row.has_ended and row.status is None for row in self.cells):
            return FAILED
        return 0 if codes <= {0} else 3


def row_of(report: Report, **more: object) -> Row:
    """Returns the row of a cell's report. more: model, target, bundle, exit_code, seconds, node."""
    performance, quality = report.fitted.performance, report.quality
    figures = {"memory": performance.memory_total, "prefill": performance.prefill, "decode": performance.decode}
    values = {f"{name}_{'bytes' if name == 'memory' else 'ms'}": figure.value for name, figure in figures.items()}
    return Row(
        status=report.outcome,
        headline=report.headline,
        rise_percent=quality.rise_percent,
        grade=quality.grade,
        parameters=report.fitted.parameters,
        **values,
        **{f"{name}_source": figure.source for name, figure in figures.items()},
        **more,
    )
