"""frontier(): a ladder of model sizes, each pruned, built, measured and evaluated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.commands.result import Result
from edgeprune.errors import InputError
from edgeprune.ondevice.budget import CONSTRAINTS, Budget, Limit
from edgeprune.pipeline.flow import planner_of, search_budget, with_packed_formats, working
from edgeprune.pipeline.provenance import command_line
from edgeprune.pipeline.request import DEMO, FRONTIER_RUNGS, request_of
from edgeprune.pipeline.results import Fitted
from edgeprune.pipeline.robustness import robustness
from edgeprune.pipeline.setup import prepare
from edgeprune.pipeline.sketch import sketch_file
from edgeprune.pipeline.stages import Run
from edgeprune.progress import OnProgress, Progress, progress_of
from edgeprune.report.frontier import Frontier
from edgeprune.search.search import RUNG_CANDIDATES

if TYPE_CHECKING:
    from edgeprune.search.solve import Allocation

WORST_FRONTIER_NATS = 0.7  # predicted loss at the end of a frontier: perplexity about doubled


def frontier(
    model: str | Path = DEMO,
    *,
    rungs: int = FRONTIER_RUNGS,
    progress: Progress | OnProgress | None = None,
    **options: Any,
) -> Result[Frontier]:
    """Fits a ladder of `rungs` sizes and writes them as one bundle to pick from.

    The rungs divide the way in decode time from the dense model, which is none of them, to where perplexity is
    predicted to double. options, progress and errors as of fit; there is no budget.
    """
    from edgeprune.bundle.read import read_frontier
    from edgeprune.bundle.write import write_frontier

    if rungs < 2:
        raise InputError(
            f"--rungs {rungs} is less than 2", "A frontier has two rungs at least; `edgeprune fit` makes one model."
        )
    setup = prepare(request_of(model=model, rungs=rungs, **options), ladder=True)
    command = command_line(setup.request, "frontier", left_out=CONSTRAINTS)
    with working(setup, command, progress_of(progress)) as run:
        if run is not None:
            write_frontier(_fitted(run), run.journal, command)
    return Result(setup.output, read_frontier(setup.output))


def _fitted(run: Run) -> list[Fitted]:
    """Returns the rungs, the largest first."""
    run = with_packed_formats(run)
    setup = run.setup
    dense, planner = run.dense.performance, planner_of(run)
    # Each rung is a search of its own below the last one; all share what was measured before.
    fitted: list[Fitted] = []
    last: Allocation = planner.problem.everything  # which is no rung
    for index, share in enumerate(planner.shares("decode", setup.request.rungs, WORST_FRONTIER_NATS)):
        budget = Budget(decode=Limit(share, relative=True, asked=f"{100 * share:.3g}%"))
        outcome, chosen, allocation = search_budget(run, planner, budget, f"rung-{index}", RUNG_CANDIDATES, last)
        if allocation == last:
            run.progress.note(f"the ladder ends after {index} rungs: the width grid holds nothing smaller")
            break
        last = allocation
        chosen = run.recovered(chosen)
        gains = planner.gains(budget.absolute(dense).limits, allocation)
        quality = run.evaluator.quality(f"of rung {index}", chosen)
        quality = run.evaluator.with_pictures(f"of rung {index}", chosen, quality)
        rung = replace(setup, budget=budget)
        sketch = sketch_file(run)
        seconds = run.journal.seconds
        one = Fitted(rung, run.samples, dense, chosen, outcome, quality, None, seconds, gains, planner.latency)
        fitted.append(replace(one, sketch=sketch))
    odd = robustness(run, [rung.chosen for rung in fitted])
    return [replace(rung, robustness=of) for rung, of in zip(fitted, odd, strict=True)]
