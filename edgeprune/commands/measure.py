"""measure(): finish a bundle on a device or here, from the workstation, and draw its report anew."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune.bundle.read import read_report, render_again
from edgeprune.engine.remote import target_of
from edgeprune.ondevice.finish import finish
from edgeprune.ondevice.measure import Here
from edgeprune.progress import Progress, Silent

if TYPE_CHECKING:
    from edgeprune.report.schema import Report


def measure(bundle: Path, target: str | None, keep_remote: bool, progress: Progress | None = None) -> Report:
    """Build, check and measure the bundle's rungs until one meets the budget; the bundle's new report.

    Raises InputError for a bad target or folder, EngineError where the device or the engine fails.
    """
    device = target_of(target, keep_remote)
    finish(bundle, device or Here(), "this machine" if device is None else str(device), (progress or Silent()).track)
    render_again(bundle)
    return read_report(bundle)
