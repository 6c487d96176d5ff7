"""measure(): finish a bundle on a device or here, from the workstation, and draw its report anew."""

from __future__ import annotations

from pathlib import Path

from edgeprune.bundle.read import check_reports, read_report, render_again
from edgeprune.commands.result import Result
from edgeprune.engine.answers import ThisMachine
from edgeprune.engine.remote import target_of
from edgeprune.ondevice.bundle import open_chosen, rungs_of
from edgeprune.ondevice.durations import timing
from edgeprune.ondevice.finish import finish
from edgeprune.progress import OnProgress, Progress, progress_of
from edgeprune.report.schema import Report


def measure(
    bundle: str | Path,
    *,
    target: str | None = None,
    keep_remote: bool = False,
    progress: Progress | OnProgress | None = None,
) -> Result[Report]:
    """Builds, checks and measures a bundle's rungs until one meets the budget, and writes that into its report.

    target: ssh://USER@HOST[:PORT]; None: this machine. Raises InputError for a bad target or folder, EngineError where
    the device or the engine fails.
    """
    folder, device = Path(bundle), target_of(target, keep_remote)
    where = "this machine" if device is None else str(device)
    open_chosen(folder)
    check_reports(folder)
    shown = progress_of(progress)
    count, seconds = len(rungs_of(folder)), timing().measure_seconds
    several = f"; {count} rungs until one meets the budget" if count > 1 else ""
    shown.note(f"duration: the build of an engine, then at most {seconds:.0f} s of measurements{several}")
    finish(folder, device or ThisMachine(), where, shown.track, Report.model_validate_json)
    render_again(folder)
    return Result(folder, read_report(folder))
