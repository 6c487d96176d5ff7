"""The steps that fit and frontier share: dense model, planner, search, rungs, quality."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import log1p
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune.ondevice.budget import Budget, judge, judge_quality
from edgeprune.ondevice.figures import Measured, Performance
from edgeprune.pipeline.evaluation import Evaluator
from edgeprune.pipeline.journal import Journal, open_journal
from edgeprune.pipeline.results import Candidate, Quality, QualityStop, Samples
from edgeprune.pipeline.setup import Setup
from edgeprune.pipeline.stages import Run
from edgeprune.progress import Progress
from edgeprune.search.latency_table import estimated_costs, fit, measured_times, memory_costs
from edgeprune.search.planner import Planner
from edgeprune.search.search import (
    MAX_CANDIDATES,
    NUDGE,
    Costs,
    Outcome,
    QualityTrial,
    Rise,
    corrected,
    search,
    search_quality,
)

if TYPE_CHECKING:
    from edgeprune.search.solve import Allocation
    from edgeprune.search.widths import Sensitivities

MEASUREMENT_MARGIN = 0.015  # share of a limit to stay below where the figure carries noise


def planner_of(
    setup: Setup,
    dense: Performance,
    sensitivities: Sensitivities,
    vocabularies: Mapping[int, float],
    journal: Journal,
    progress: Progress,
) -> Planner:
    """dense: what the dense model needs and reaches; vocabularies: predicted loss by size, the full one at 0.

    Measures the cost of widths where the engine measures at all and the cache does not know it. Raises EngineError.
    """
    from edgeprune.search.solve import Problem
    from edgeprune.search.widths import dense_widths

    decoder, profile, multiple = setup.model.decoder, setup.profile, setup.profile.channel_multiple
    parts = (decoder, profile, setup.workload, setup.precision)
    if setup.engine.measures:
        progress.stage("measure what a width costs")
        times = journal.stage("costs", lambda: measured_times(setup.engine, *parts, journal.folder, progress.track))
        latency = fit(decoder, profile, setup.precision, times, f"models of random weights on {setup.engine.name}")
    else:
        latency = estimated_costs(*parts)
    costs = {"memory": memory_costs(*parts), "prefill": latency.prefill, "decode": latency.decode}
    problem = Problem(dense_widths(decoder), sensitivities, costs, multiple, dict(vocabularies))
    estimator = corrected(problem.estimate, problem.everything, dense.values)
    return Planner(problem, setup.request.layout, latency, estimator)


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
        self,
        planner: Planner,
        budget: Budget,
        name: str = "candidate",
        most: int = MAX_CANDIDATES,
        above: Allocation | None = None,
    ) -> tuple[Outcome, Candidate, Allocation]:
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
