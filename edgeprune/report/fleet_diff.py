"""The differences of two fleets, cell by cell, as a document and in the terminal.

It compares what the reports of their bundles hold, and measures nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import Field

from edgeprune.errors import InputError
from edgeprune.report.base import Strict
from edgeprune.report.diff import NOT_THERE, DiffReport, Made, diff_of
from edgeprune.report.fleet import Row
from edgeprune.report.fleet_page import label_of

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

SHOWN = ("memory", "prefill", "decode")  # figures of a cell in the terminal's table


class CellDifference(Strict):
    """One cell of two fleets."""

    model: str
    target: str
    first: str = Field(description="the verdict in the first fleet")
    second: str
    diff: DiffReport | None = Field(None, description="of the bundles; none: one of the cells has no bundle")


class FleetDiff(Strict):
    """The differences of two fleets."""

    first: str
    second: str
    cells: list[CellDifference]
    failed: list[str] = Field(description="guards of --fail-on that cells of the second fleet fail, in words")


@dataclass(frozen=True)
class MadeCell:
    """A cell as it is compared: its row, and its bundle where it has one."""

    row: Row
    made: Made | None


def fleet_diff(
    names: tuple[str, str], first: Sequence[MadeCell], second: Sequence[MadeCell], guards: Mapping[str, float]
) -> FleetDiff:
    """Returns the differences of two fleets, by model and target.

    guards: as of diff_of; a cell whose bundle is gone fails them all. Raises InputError as diff_of, which names the
    cell.
    """
    old, new = ({(cell.row.model, cell.row.target): cell for cell in cells} for cells in (first, second))
    cells, failed = [], []
    for key in dict.fromkeys([*old, *new]):
        pair, name = [of.get(key) for of in (old, new)], " on ".join(key)
        made = [cell.made if cell else None for cell in pair]
        diff = None
        if None not in made:
            try:
                diff = diff_of(*made, guards)
            except InputError as error:
                raise InputError(f"{name}: {error.message}", error.remedy) from None
            failed += [f"{name}: {words}" for words in diff.failed]
        elif guards and made[0] is not None:
            failed.append(f"{name}: {names[1]} has no bundle of it")
        labels = [label_of(cell.row) if cell else NOT_THERE for cell in pair]
        cells.append(CellDifference(model=key[0], target=key[1], first=labels[0], second=labels[1], diff=diff))
    return FleetDiff(first=names[0], second=names[1], cells=cells, failed=failed)


def print_fleet_diff(report: FleetDiff, console: Console) -> None:
    """Prints a line for each cell: both verdicts, and by how much figures and perplexity changed."""
    from edgeprune.report.terminal import styled, table

    rows = []
    for cell in report.cells:
        verdicts = cell.first if cell.first == cell.second else f"{cell.first}, now {cell.second}"
        rows.append((cell.model, cell.target, verdicts, *_changes(cell)))
    console.print(styled(f"{report.first}, then {report.second}", "bold"))
    console.print(table(("model", "target", "verdict", *SHOWN, "perplexity", "else"), rows))
    for words in report.failed:
        console.print(styled(f"Failed: {words}", "bold red"))


def _changes(cell: CellDifference) -> list[str | Text]:
    """Returns the changes of a cell's figures in percent, that of the worst text, and how much else differs."""
    if cell.diff is None:
        return [""] * (len(SHOWN) + 2)
    by_name = {one.name: one.percent for one in cell.diff.differences if one.group == "figures"}
    rises = [one.percent for one in cell.diff.differences if one.group == "quality" and one.percent is not None]
    percents = [*(by_name[name] for name in SHOWN), max(rises, default=None)]
    others = [one.name for one in cell.diff.differences if one.group in ("model", "made of")]
    words = "" if not others else others[0] if len(others) == 1 else f"{others[0]} and {len(others) - 1} more"
    return ["" if one is None else f"{one:+.1f} %" if abs(one) >= 0.05 else "=" for one in percents] + [words]
