"""load_bundle(): a finished bundle, its files checked to be there, and its document."""

from __future__ import annotations

from pathlib import Path

from edgeprune.bundle.read import read_frontier, read_report
from edgeprune.commands.result import Result
from edgeprune.ondevice.bundle import FRONTIER, open_bundle
from edgeprune.report.frontier import Frontier
from edgeprune.report.schema import Report


def load_bundle(bundle: str | Path) -> Result[Report] | Result[Frontier]:
    """Returns a bundle that fit or frontier wrote. Raises InputError where it is none, or misses a file."""
    folder = Path(bundle)
    if open_bundle(folder).get("kind") == FRONTIER:
        return Result(folder, read_frontier(folder))
    return Result(folder, read_report(folder))
