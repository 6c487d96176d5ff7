"""One cell of a fleet, as a worker runs it: an ordinary fit, whose end becomes a row.

It knows nothing of the cluster that it runs in.
"""

from __future__ import annotations

import platform
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edgeprune.errors import BudgetError, BusyError, EdgepruneError
from edgeprune.report.fleet import Row, row_of

BUSY_SECONDS = 120.0  # for which a cell waits until the process that had its folder has ended with its node
TELL_SECONDS = 0.5  # between two words on how far a cell is
BUG = 1  # exit code of an error that is no error of ours
OnStage = Callable[[str, int, int], None]


def run_cell(
    names: Mapping[str, str], options: Mapping[str, Any], folder: Path, shared: Path, on_stage: OnStage
) -> dict[str, Any]:
    """Returns the row of a cell as JSON, after its fit went on where an earlier attempt was ended, if any.

    names: of its model and target; folder: of the fleet; shared: of stages that its cells share; on_stage: called with
    stage, steps done and steps in all.
    """
    begun = time.monotonic()
    bundle = Path(names["model"]) / names["target"]
    more = {**names, "node": platform.node()}
    try:
        report, code = _fitted(options, folder / bundle, shared, _seldom(on_stage))
        row = row_of(report, exit_code=code, bundle=str(bundle), seconds=time.monotonic() - begun, **more)
    except EdgepruneError as error:
        status = "out_of_reach" if isinstance(error, BudgetError) else None
        reason = f"{error.message}. {error.remedy}"
        seconds = time.monotonic() - begun
        row = Row(status=status, exit_code=error.exit_code, reason=reason, seconds=seconds, **more)
    except Exception as error:  # a bug ends its cell, not the fleet
        last = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {error} ({Path(last.filename).name}, line {last.lineno})"
        row = Row(exit_code=BUG, reason=reason, seconds=time.monotonic() - begun, **more)
    return row.model_dump(mode="json")


def _fitted(options: Mapping[str, Any], bundle: Path, shared: Path, on_stage: OnStage) -> tuple[Any, int]:
    """Returns the report of a fit and its exit code. Raises EdgepruneError."""
    from edgeprune.commands.fit import fit

    end = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            result = fit(**options, output=bundle, resume=True, shared=shared, progress=on_stage)
            return result.report, result.report.exit_code(bool(options.get("require_measured")))
        except BusyError:
            if time.monotonic() > end:
                raise
            time.sleep(1.0)


def _seldom(on_stage: OnStage) -> OnStage:
    """Returns a function that passes on each new stage, and its steps from time to time."""
    last = [0.0, ""]

    def tell(stage: str, done: int, total: int) -> None:
        if stage != last[1] or time.monotonic() - last[0] >= TELL_SECONDS:
            last[:] = time.monotonic(), stage
            on_stage(stage, done, total)

    return tell
