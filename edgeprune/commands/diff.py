"""diff(): what changed between two bundles or two fleets, and whether the second is worse by more than is allowed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from edgeprune.bundle.read import read_report
from edgeprune.commands.result import Result
from edgeprune.errors import InputError
from edgeprune.files import read_text
from edgeprune.ondevice.bundle import open_chosen
from edgeprune.pipeline.run_file import RUN_FILE, read_run_file
from edgeprune.report.diff import GUARDS, DiffReport, Made, diff_of
from edgeprune.report.fleet import FLEET_FILE, Fleet
from edgeprune.report.fleet_diff import FleetDiff, MadeCell, fleet_diff


def diff(
    first: str | Path, second: str | Path, *, fail_on: Mapping[str, float] | None = None
) -> Result[DiffReport] | Result[FleetDiff]:
    """Compares two bundles of `fit`, or picked ones, or two folders of `fleet`.

    fail_on: by how many percent memory, latency or quality (perplexity) of the second may be above the first's. Raises
    InputError for a folder that is no bundle, an unknown guard, and a guard whose figures cannot be compared.
    """
    for name, percent in (fail_on or {}).items():
        if name not in GUARDS or not 0 <= percent < float("inf"):
            raise InputError(
                f"--fail-on {name}={percent:g} is no guard", f"Give one of {', '.join(GUARDS)} and a percent from 0."
            )
    folders = Path(first), Path(second)
    fleets = [(folder / FLEET_FILE).is_file() for folder in folders]
    if fleets == [True, True]:
        names = tuple(folder.resolve().name for folder in folders)
        return Result(folders[1], fleet_diff(names, *map(_cells, folders), fail_on or {}))
    if any(fleets):
        raise InputError(
            f"{folders[fleets.index(True)]} is a fleet, {folders[fleets.index(False)]} is not",
            "Give two fleets, or two bundles.",
        )
    return Result(folders[1], diff_of(*map(_made, folders), fail_on or {}))


def _cells(folder: Path) -> list[MadeCell]:
    """Returns the cells of a fleet with their bundles. Raises InputError for a document that no fleet wrote."""
    from pydantic import ValidationError

    path = folder / FLEET_FILE
    try:
        rows = Fleet.model_validate_json(read_text(path)).cells
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise InputError(
            f"{path} is not a fleet's: {place}: {first['msg']}", "Copy the fleet's folder again."
        ) from None
    return [MadeCell(row, None if row.bundle is None else _made(folder / row.bundle)) for row in rows]


def _made(folder: Path) -> Made:
    manifest = open_chosen(folder)
    path = folder / RUN_FILE
    return Made(folder.resolve().name, read_report(folder), manifest, read_run_file(path) if path.is_file() else {})
