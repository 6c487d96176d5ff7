"""frontier(): a ladder of model sizes, each pruned, built, measured and evaluated."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune.ondevice.budget import Budget, Limit
from edgeprune.pipeline.flow import _begin, _flow
from edgeprune.pipeline.request import Request
from edgeprune.pipeline.results import Fitted
from edgeprune.pipeline.setup import prepare
from edgeprune.progress import Progress, Silent
from edgeprune.search.search import RUNG_CANDIDATES

if TYPE_CHECKING:
    from edgeprune.search.solve import Allocation

WORST_FRONTIER_NATS = 0.7  # predicted loss at the end of a frontier: perplexity about doubled


def frontier(request: Request, progress: Progress | None = None) -> Path:
    """A ladder of `request.rungs` sizes, each pruned, built, measured and evaluated; returns the bundle's folder.

    The rungs divide the way in decode time from the dense model to where perplexity is predicted to double.
    Raises as fit does.
    """
    from edgeprune.bundle.write import ship_frontier

    progress = progress or Silent()
    setup = prepare(request, ladder=True)
    journal, work = _begin(setup, progress)
    flow = _flow(setup, journal, progress)
    planner = flow.planner()
    fitted: list[Fitted] = []
    last: Allocation | None = None
    for index, share in enumerate(planner.shares("decode", request.rungs, WORST_FRONTIER_NATS)):
        budget = Budget(decode=Limit(share, relative=True, asked=f"{100 * share:.3g}%"))
        outcome, chosen, allocation = flow.search(planner, budget, f"rung-{index}", RUNG_CANDIDATES, last)
        if allocation == last:
            progress.note(f"the ladder ends after {index} rungs: the width grid holds nothing smaller")
            break
        last = allocation
        gains = planner.gains(budget.absolute(flow.dense.performance).limits, allocation)
        quality = flow.evaluator.quality(f"of rung {index}", chosen)
        fitted.append(
            Fitted(
                replace(setup, budget=budget),
                flow.samples,
                flow.dense.performance,
                chosen,
                outcome,
                flow.evaluator.with_pictures(f"of rung {index}", chosen, quality),
                None,
                journal.seconds,
                gains,
                planner.latency,
            )
        )
    ship_frontier(fitted, work)
    shutil.rmtree(work)
    return setup.output
