"""fit() and frontier(): the ways through the house. Read this file first.

    samples -> dense -> sensitivities -> costs -> search (plan, prune, export, build, measure) -> evaluation
    -> cross-check -> bundle and report

Every station is a stage of the journal: a killed run goes on after the last one that finished.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import log1p
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune.ondevice.budget import Budget, Limit, judge, judge_quality
from edgeprune.ondevice.figures import Measured
from edgeprune.pipeline.evaluation import Evaluator
from edgeprune.pipeline.journal import Journal, open_journal
from edgeprune.search.planner import Planner, planner_of
from edgeprune.pipeline.setup import Setup, prepare
from edgeprune.progress import Progress, Silent
from edgeprune.pipeline.request import Request
from edgeprune.pipeline.results import Candidate, Fitted, Quality, QualityStop, Samples
from edgeprune.search.search import (
    MAX_CANDIDATES,
    NUDGE,
    RUNG_CANDIDATES,
    Costs,
    Outcome,
    QualityTrial,
    Rise,
    search,
    search_quality,
)
from edgeprune.pipeline.stages import Run

if TYPE_CHECKING:
    from edgeprune.search.solve import Allocation

MEASUREMENT_MARGIN = 0.015  # share of a limit to stay below where the figure carries noise
WORST_FRONTIER_NATS = 0.7  # predicted loss at the end of a frontier: perplexity about doubled


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
            setup, flow.samples, flow.dense.performance, rung, outcome, quality, cross_check, journal.seconds, gains,
            costs, stop,
        )
        for rung, quality in zip(rungs, qualities, strict=True)
    ]  # fmt: skip
    ship(fitted, work)
    shutil.rmtree(work)
    return setup.output


def frontier(request: Request, progress: Progress | None = None) -> Path:
    """A ladder of `request.rungs` sizes, each pruned, built, measured and evaluated; returns the bundle's folder.

    The rungs divide the way in decode time from the dense model to where perplexity is predicted to double.
    Raises as fit does.
    """
    from edgeprune.bundle.pick import ship_frontier

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
                replace(setup, budget=budget), flow.samples, flow.dense.performance, chosen, outcome,
                flow.evaluator.with_pictures(f"of rung {index}", chosen, quality), None, journal.seconds, gains,
                planner.latency,
            )
        )  # fmt: skip
    ship_frontier(fitted, work)
    shutil.rmtree(work)
    return setup.output


def _begin(setup: Setup, progress: Progress) -> tuple[Journal, Path]:
    for choice in setup.choices:
        progress.note(f"{choice.name}: {choice.value} ({choice.reason})")
    work = setup.output.with_name(setup.output.name + ".work")
    return open_journal(work, setup.fingerprint, setup.request.resume, setup.request.force), work


def _flow(setup: Setup, journal: Journal, progress: Progress) -> Flow:
    run = Run(setup, journal, progress)
    plain = run.export_dense()
    samples = run.draw_samples(plain)
    dense = run.measure_dense(plain, samples)
    return Flow(run, plain, samples, dense, Evaluator(setup, journal, progress, samples, plain))


@dataclass(frozen=True)
class Flow:
    """A run with what every search in it starts from."""

    run: Run
    plain: Path
    samples: Samples
    dense: Candidate
    evaluator: Evaluator

    def planner(self) -> Planner:
        run = self.run
        sensitivities = run.measure_sensitivities(self.samples)
        losses = run.vocabulary_losses(self.samples)
        return planner_of(run.setup, self.dense.performance, sensitivities, losses, run.journal, run.progress)

    def search(
        self, planner: Planner, budget: Budget, name: str = "candidate", most: int = MAX_CANDIDATES,
        above: Allocation | None = None,
    ) -> tuple[Outcome, Candidate, Allocation]:  # fmt: skip
        """Propose, prune, build, measure, correct; the chosen candidate. above: what it must cost less than."""
        limits = budget.absolute(self.dense.performance).limits
        candidates: list[Candidate] = []

        def obtain(index: int, allocation: Allocation, predicted: dict[str, float]) -> Costs:
            candidates.append(self._candidate(f"{name}-{index + 1}", allocation))
            obtained = candidates[-1].performance
            return Costs(obtained.values, judge(budget, self.dense.performance, obtained).status)

        most_estimated = {} if above is None else planner.problem.estimate(above)

        def solve(room: Mapping[str, float]) -> Allocation | None:
            lower = {name: limit * (1 - NUDGE) for name, limit in most_estimated.items() if name in room}
            return planner.solve({name: min(limit, lower.get(name, limit)) for name, limit in room.items()})

        outcome = search(solve, planner.problem.smallest, planner.estimator, limits, self._margins(), obtain, most)
        return outcome, candidates[outcome.chosen], outcome.trials[outcome.chosen].allocation

    def _candidate(self, name: str, allocation: Allocation) -> Candidate:
        self.run.progress.note(f"{name}: {allocation}")
        return self.run.candidate(name, allocation, self.samples, self.dense)

    def _margins(self) -> dict[str, float]:
        dense = self.dense.performance
        measured = {name for name in ("prefill", "decode") if isinstance(getattr(dense, name), Measured)}
        if isinstance(dense.memory.activations, Measured):
            measured.add("memory")
        return {name: MEASUREMENT_MARGIN if name in measured else 0.0 for name in ("memory", "prefill", "decode")}

    def smaller(self, planner: Planner, chosen: Allocation) -> list[Candidate]:
        """Smaller candidates for the bundle, in case the device's own figures are worse than what is known here."""
        setup = self.run.setup
        limits = setup.budget.absolute(self.dense.performance).limits
        found = planner.smaller(chosen, limits, setup.request.rungs - 1)
        return [self._candidate(f"rung-{index}", allocation) for index, allocation in enumerate(found, 1)]

    def qualities(self, rungs: list[Candidate]) -> list[Quality]:
        return [self.evaluator.quality(str(index), rung) for index, rung in enumerate(rungs)]

    def with_pictures(self, rungs: list[Candidate], qualities: list[Quality]) -> list[Quality]:
        """Of an image generator: drawn for what is shipped, not for all that was tried."""
        pairs = zip(rungs, qualities, strict=True)
        return [self.evaluator.with_pictures(str(index), *pair) for index, pair in enumerate(pairs)]

    def quality_status(self, quality: Quality) -> str:
        return judge_quality(self.run.setup.budget, quality.rises)

    def within_quality(
        self, planner: Planner, candidate: Candidate, allocation: Allocation, quality: Quality
    ) -> tuple[QualityStop, list[Candidate], list[Quality]]:
        """The smallest model within the quality limit, which the budget's candidate exceeds: the dense one at worst."""
        setup, dense = self.run.setup, self.dense.performance
        limits = setup.budget.absolute(dense).limits
        found: dict[int, tuple[Candidate, Quality]] = {}

        def at(share: float) -> Allocation | None:
            return planner.within(
                {name: dense.values[name] + share * (limit - dense.values[name]) for name, limit in limits.items()}
            )

        def rise_of(quality: Quality) -> Rise:
            worst = max(high for _, high in quality.rises)
            return Rise(log1p(worst / 100), self.quality_status(quality))

        def obtain(index: int, allocation: Allocation) -> Rise:
            candidate = self._candidate(f"quality-{index + 1}", allocation)
            planner.estimator.correct(allocation, candidate.performance.values)
            found[index] = candidate, self.evaluator.quality(f"quality-{index + 1}", candidate)
            return rise_of(found[index][1])

        limit = log1p(setup.budget.max_quality_loss / 100)
        trials = search_quality(at, limit, (allocation, rise_of(quality)), obtain)
        chosen = _furthest_met(trials)
        if chosen is None:
            kept = self.run.keep_dense(self.dense, self.samples)
            found[-1], chosen = (kept, self.evaluator.quality("of the dense model", kept)), -1
        kept, kept_quality = found[chosen]
        return QualityStop(candidate, quality, len(trials)), [kept], [kept_quality]


def _furthest_met(trials: tuple[QualityTrial, ...]) -> int | None:
    met = [index for index, trial in enumerate(trials) if trial.rise.status == "met"]
    return max(met, key=lambda index: trials[index].share, default=None)
