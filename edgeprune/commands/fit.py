"""fit(): the way through the house. Read this file first.

    formats -> samples -> dense -> sensitivities -> costs -> search (plan, prune, export, build, measure)
    -> recovery -> evaluation -> cross-check -> bundle and report

Every step is a stage of the journal: a killed run goes on after the last one that finished.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from edgeprune.commands.result import Result
from edgeprune.ondevice.budget import judge
from edgeprune.pipeline.flow import (
    planner_of,
    quality_status,
    search_budget,
    smaller_candidates,
    with_packed_formats,
    within_quality,
    working,
)
from edgeprune.pipeline.provenance import command_line
from edgeprune.pipeline.request import DEMO, request_of
from edgeprune.pipeline.results import Fitted
from edgeprune.pipeline.rivals import best_recovered
from edgeprune.pipeline.robustness import robustness
from edgeprune.pipeline.setup import prepare
from edgeprune.pipeline.sketch import sketch_file
from edgeprune.pipeline.stages import Run
from edgeprune.progress import OnProgress, Progress, progress_of
from edgeprune.report.schema import Report


def fit(
    model: str | Path = DEMO,
    *,
    progress: Progress | OnProgress | None = None,
    shared: Path | None = None,
    **options: Any,
) -> Result[Report]:
    """Fits a model into a device's budget and writes a bundle.

    options: those of `edgeprune fit`, with underscores, as pipeline.request.Request lists them; progress: called with
    a stage, steps done and steps in all (0: unknown); shared: a folder where runs of one fleet leave the stages that
    they share, and wait for each other's. Raises InputError, BudgetError or EngineError; a budget that
    turns out to be out of reach is no error here: the best candidate is kept, and the report states it.
    """
    from edgeprune.bundle.read import read_report
    from edgeprune.bundle.tracking import Tracking
    from edgeprune.bundle.write import write_fitted

    # Resolve the request; nothing long or written before this.
    setup = prepare(request_of(model=model, **options), shared=shared)
    tracking = Tracking(setup.request.mlflow) if setup.request.mlflow else None
    command = command_line(setup.request)
    with working(setup, command, progress_of(progress), shared) as run:
        if run is not None:
            write_fitted(_fitted(run), run.journal, command)
    result = Result(setup.output, read_report(setup.output))
    if tracking is not None and run is not None:
        tracking.log(result.bundle, result.report)
    return result


def _fitted(run: Run) -> list[Fitted]:
    """Returns the rungs of the bundle, the chosen one first: within the budget where one was found."""
    run = with_packed_formats(run)
    setup = run.setup
    dense = run.dense.performance
    stop, outcome, gains, costs, levers, rivals = None, None, {}, None, None, ()
    if judge(setup.budget, dense, dense).met and None in setup.weights.layers and None in setup.cache.formats:
        run.progress.note("the dense model already meets the budget: it is exported as it is")
        rungs = [run.dense_candidate]
        if setup.request.rungs > 1:
            planner = planner_of(run)
            rungs += map(run.recovered, smaller_candidates(run, planner, planner.problem.everything))
        qualities = run.evaluator.qualities(rungs)
    else:
        # Search the budget, train what was found where that was asked for, then judge its quality.
        planner = planner_of(run)
        costs = planner.latency
        outcome, chosen, allocation = search_budget(run, planner, setup.budget)
        limits = setup.budget.absolute(dense).limits
        gains = planner.gains(limits, allocation)
        best = best_recovered(run, planner, outcome, chosen)
        chosen, allocation, rivals = best.candidate, best.allocation, best.rivals
        rungs, qualities = [chosen], [best.quality]
        if quality_status(run, qualities[0]) == "missed":
            stop, chosen, allocation, quality = within_quality(run, planner, chosen, allocation, qualities[0])
            rungs = [run.recovered(chosen)]
            qualities = [quality if rungs[0] is chosen else run.evaluator.quality("recovered", rungs[0])]
        elif judge(setup.budget, dense, chosen.performance).met:
            rungs += map(run.recovered, smaller_candidates(run, planner, allocation))
            qualities += [run.evaluator.quality(str(index), rung) for index, rung in enumerate(rungs[1:], 1)]
        levers = planner.levers(limits, allocation)
    # Images are drawn of what the bundle will hold, not of all that was tried.
    pairs = zip(rungs, qualities, strict=True)
    qualities = [run.evaluator.with_pictures(str(index), *pair) for index, pair in enumerate(pairs)]
    cross_check = None if outcome is None else run.cross_check(rungs[0])
    odd = robustness(run, rungs)
    sketch = sketch_file(run)
    seconds = run.journal.seconds
    fitted = [
        Fitted(setup, run.samples, dense, rung, outcome, quality, cross_check, seconds, gains, costs, stop, levers)
        for rung, quality in zip(rungs, qualities, strict=True)
    ]
    fitted = [replace(rung, sketch=sketch, robustness=of) for rung, of in zip(fitted, odd, strict=True)]
    return [replace(fitted[0], rivals=rivals), *fitted[1:]]
