"""fit() and frontier(): the ways through the house. Read this file first.

    samples -> dense -> sensitivities -> costs -> search (plan, prune, export, build, measure) -> evaluation
    -> cross-check -> bundle and report

Every station is a stage of the journal: a killed run goes on after the last one that finished.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune.ondevice.budget import judge
from edgeprune.pipeline.flow import _begin, _flow
from edgeprune.pipeline.request import Request
from edgeprune.pipeline.results import Fitted
from edgeprune.pipeline.setup import prepare
from edgeprune.progress import Progress, Silent

if TYPE_CHECKING:
    pass


def fit(request: Request, progress: Progress | None = None) -> Path:
    """Fit the model into the budget; returns the finished bundle's folder.

    Raises InputError, BudgetError or EngineError; a budget that turns out to be out of reach is no
    error here: the best candidate is kept and the report says so.
    """
    from edgeprune.bundle.write import ship

    progress = progress or Silent()
    setup = prepare(request)
    journal, work = _begin(setup, progress)
    flow = _flow(setup, journal, progress)
    stop, outcome, gains, costs = None, None, {}, None
    if judge(setup.budget, flow.dense.performance, flow.dense.performance).met:
        progress.note("the dense model already meets the budget: it is exported as it is")
        rungs = [flow.run.keep_dense(flow.dense, flow.samples)]
        if setup.request.rungs > 1:
            planner = flow.planner()
            rungs += flow.smaller(planner, planner.problem.everything)
        qualities = flow.qualities(rungs)
    else:
        planner = flow.planner()
        costs = planner.latency
        outcome, chosen, allocation = flow.search(planner, setup.budget)
        gains = planner.gains(setup.budget.absolute(flow.dense.performance).limits, allocation)
        rungs, qualities = [chosen], [flow.evaluator.quality("0", chosen)]
        if flow.quality_status(qualities[0]) == "missed":
            stop, rungs, qualities = flow.within_quality(planner, chosen, allocation, qualities[0])
        elif judge(setup.budget, flow.dense.performance, chosen.performance).met:
            rungs += flow.smaller(planner, allocation)
            qualities = flow.qualities(rungs)
    qualities = flow.with_pictures(rungs, qualities)
    cross_check = None if outcome is None else flow.run.cross_check(flow.plain, rungs[0])
    fitted = [
        Fitted(
            setup,
            flow.samples,
            flow.dense.performance,
            rung,
            outcome,
            quality,
            cross_check,
            journal.seconds,
            gains,
            costs,
            stop,
        )
        for rung, quality in zip(rungs, qualities, strict=True)
    ]
    ship(fitted, work)
    shutil.rmtree(work)
    return setup.output
