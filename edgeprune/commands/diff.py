"""diff(): what changed between two bundles, and whether the second is worse by more than is allowed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from edgeprune.bundle.read import read_report
from edgeprune.commands.result import Result
from edgeprune.errors import InputError
from edgeprune.ondevice.bundle import open_chosen
from edgeprune.pipeline.run_file import RUN_FILE, read_run_file
from edgeprune.report.diff import GUARDS, DiffReport, Made, diff_of


def diff(first: str | Path, second: str | Path, *, fail_on: Mapping[str, float] | None = None) -> Result[DiffReport]:
    """Compares two bundles of `fit`, or picked ones.

    fail_on: by how many percent memory, latency or quality (perplexity) of the second may be above the first's. Raises
    InputError for a folder that is no bundle, an unknown guard, and a guard whose figures cannot be compared.
    """
    for name, percent in (fail_on or {}).items():
        if name not in GUARDS or not 0 <= percent < float("inf"):
            raise InputError(
                f"--fail-on {name}={percent:g} is no guard", f"Give one of {', '.join(GUARDS)} and a percent from 0."
            )
    return Result(Path(second), diff_of(_made(Path(first)), _made(Path(second)), fail_on or {}))


def _made(folder: Path) -> Made:
    manifest = open_chosen(folder)
    path = folder / RUN_FILE
    return Made(folder.resolve().name, read_report(folder), manifest, read_run_file(path) if path.is_file() else {})
