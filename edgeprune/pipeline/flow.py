"""The search of a run, step by step: planner, candidates within a budget, smaller ones, the quality limit.

fit and frontier are made of these. What a stage does is in stages.py, what is best is decided in search/.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from math import log1p
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune.errors import InputError
from edgeprune.files import WriteError, read_json, writing
from edgeprune.ondevice.budget import BROKEN_PERCENT, Budget, judge
from edgeprune.ondevice.bundle import MANIFEST
from edgeprune.ondevice.figures import Measured
from edgeprune.pipeline.duration import fitting_announced, samples_of
from edgeprune.pipeline.formats import without_dequantised
from edgeprune.pipeline.journal import Journal, open_journal
from edgeprune.pipeline.output import check_output, work_folder
from edgeprune.pipeline.ownership import is_bundle, listed
from edgeprune.pipeline.results import Candidate, Quality, QualityStop
from edgeprune.pipeline.room import check_memory
from edgeprune.pipeline.setup import Setup, with_weights
from edgeprune.pipeline.stages import Run
from edgeprune.pipeline.store import Store
from edgeprune.progress import Progress
from edgeprune.search.dequantised import Dequantised, dequantised_formats
from edgeprune.search.estimated_costs import estimated_costs, memory_costs
from edgeprune.search.latency_table import fit, measured_times
from edgeprune.search.planner import Planner
from edgeprune.search.search import (
    MAX_CANDIDATES,
    NUDGE,
    Costs,
    Outcome,
    QualityTrial,
    TrialRise,
    corrected,
    search,
    search_quality,
)

if TYPE_CHECKING:
    from edgeprune.search.solve import Allocation

MEASUREMENT_MARGIN = 0.015  # share of a limit to stay below where the figure carries noise


@contextmanager
def working(setup: Setup, command: str, progress: Progress, shared: Path | None = None) -> Iterator[Run | None]:
    """Opens the journal beside the output, and removes it when all within is done; notes what was chosen.

    command: the command line of the run; shared: the folder of stages that other runs share. Yields None where the
    output is complete already, which a run that goes on finds. Raises InputError as open_journal does, where the output
    is not this run's to replace, and for a run that this machine's memory does not hold.
    """
    request, output, decoder = setup.request, setup.output, setup.model.decoder
    samples = samples_of(request, setup.samples, setup.kind, decoder)
    check_memory(decoder, samples.pruned, samples.length)
    for choice in setup.choices:
        progress.note(f"{choice.name}: {choice.value} ({choice.reason})")
    with (
        _resumable(output),
        open_journal(work_folder(output), setup.fingerprint, request.resume, request.force) as journal,
    ):
        journal.store = shared and Store(shared)
        try:
            if request.resume and _is_complete(setup, command, journal):
                progress.note(f"{output} is complete already: nothing was done")
                yield None
            else:
                check_output(output, request.force, request.resume)  # another run may have written it meanwhile
                if journal.is_new:
                    progress.note(fitting_announced(setup, request.rungs))
                yield Run(setup, journal, progress)
        except BaseException:
            if journal.is_new:
                journal.remove()
            raise
        if kept := journal.remove():
            progress.note(f"kept in {journal.folder}, as no run made it: {listed(kept)}")


@contextmanager
def _resumable(output: Path) -> Iterator[None]:
    """Turns a failed write into an error that says how to go on."""
    try:
        with writing(output):
            yield
    except WriteError as error:
        error.remedy += " Then go on with --resume."
        raise


def _is_complete(setup: Setup, command: str, journal: Journal) -> bool:
    """Returns whether the output is the bundle of this run. Raises InputError where it is another's and stays."""
    output = setup.output
    if not is_bundle(output):
        return False
    manifest = read_json(output / MANIFEST)
    if manifest.get("run") == journal.id:
        return True
    if (
        journal.is_new
        and manifest.get("command") == command
        and manifest.get("fingerprint") == json.loads(json.dumps(setup.fingerprint))
    ):
        return True
    if not setup.request.force:
        raise InputError(
            f"the output directory {output} holds the bundle of another run, which --resume never replaces",
            "Give --force too to replace it, or name another directory with --output.",
        )
    return False


def with_packed_formats(run: Run) -> Run:
    """Returns a run without the weight formats that the engine's builder dequantises, or with a reason that names those
    that were asked for.

    Builds small models where the engine has a builder. Raises EngineError.
    """
    setup, weights = run.setup, run.setup.weights
    if not (setup.engine.compiles and weights.quantised):
        return run
    # Build one model in floats and one in each format.
    run.progress.stage("build in each weight format")
    parts = (weights.layers, weights.tables), setup.profile, setup.workload, setup.precision
    dequantised = run.journal.stage(
        "formats",
        lambda: [
            asdict(one)
            for one in dequantised_formats(
                setup.engine, setup.model.decoder, *parts, run.journal.scratch, run.progress.track
            )
        ],
        run.parts.formats,
    )
    # Leave out what is held in floats too.
    packed = without_dequantised(weights, setup.engine.name, [Dequantised(**one) for one in dequantised])
    if packed == weights:
        return run
    run.progress.note(f"weights: {packed.names} ({packed.reason})")
    return replace(run, setup=with_weights(setup, packed))


def planner_of(run: Run) -> Planner:
    """Returns the problem of a run: what cuts lose, what widths cost, which vocabularies there are.

    Measures the cost of widths where the engine measures at all and the cache does not know it. Raises EngineError.
    """
    from edgeprune.search.solve import Problem
    from edgeprune.search.widths import dense_widths

    # What cutting loses, by module and by vocabulary.
    setup, dense = run.setup, run.dense.performance
    sensitivities, losses = run.sensitivities, run.vocabulary_losses
    decoder, profile = setup.model.decoder, setup.profile
    weights = setup.weights
    parts, caches = (decoder, profile, setup.workload, setup.precision), setup.cache.formats
    formats = weights.formats, weights.tables, caches
    # What widths cost, measured on the engine where there is one.
    if setup.engine.measures:
        run.progress.stage("measure what a width costs")
        times = run.journal.stage(
            "costs", lambda: measured_times(setup.engine, *parts, run.journal.scratch, run.progress.track, *formats)
        )
        source = f"models of random weights on {setup.engine.name}"
        latency = fit(decoder, profile, setup.precision, times, source, *formats, setup.engine.one_width)
    else:
        latency = estimated_costs(*parts, weights.formats, caches)
    costs = {
        cache: {"memory": memory_costs(decoder.with_cache(cache), *parts[1:], weights.formats), **latency.of(cache)}
        for cache in (None, *setup.cache.quantised)
    }
    problem = Problem(
        dense_widths(decoder),
        sensitivities,
        costs[None],
        profile.channel_multiple,
        dict(losses),
        weights.formats,
        tuple(weights.formats.index(form) for form in weights.layers),
        tuple(weights.formats.index(form) for form in weights.tables),
        decoder.tie_word_embeddings,
        one_mlp_format=decoder.layers[0].mlp.experts is not None,
        caches={cache: costs[cache] for cache in caches},
    )
    estimator = corrected(problem.estimate, problem.everything, dense.values)
    return Planner(problem, setup.request.layout, latency, estimator)


def search_budget(
    run: Run,
    planner: Planner,
    budget: Budget,
    name: str = "candidate",
    most: int = MAX_CANDIDATES,
    above: Allocation | None = None,
) -> tuple[Outcome, Candidate, Allocation]:
    """Proposes, prunes, builds, measures and corrects until the budget is met or proved out of reach.

    above: what every candidate must cost less than. Returns the outcome and the chosen candidate.
    """
    dense = run.dense.performance
    limits = budget.absolute(dense).limits
    ceilings = {} if above is None else planner.problem.estimate(above)
    candidates: list[Candidate] = []

    def obtain(index: int, allocation: Allocation, predicted: dict[str, float]) -> Costs:
        candidates.append(run.candidate(f"{name}-{index + 1}", allocation))
        obtained = candidates[-1].performance
        return Costs(obtained.values, judge(budget, dense, obtained).status)

    def solve(room: Mapping[str, float]) -> Allocation | None:
        lower = {name: limit * (1 - NUDGE) for name, limit in ceilings.items() if name in room}
        return planner.solve({name: min(limit, lower.get(name, limit)) for name, limit in room.items()})

    outcome = search(solve, planner.problem.smallest, planner.estimator, limits, _margins(run), obtain, most)
    return outcome, candidates[outcome.chosen], outcome.trials[outcome.chosen].allocation


def _margins(run: Run) -> dict[str, float]:
    """Returns the share of each limit to stay below: figures that are measured carry noise."""
    dense = run.dense.performance
    measured = {name for name in ("prefill", "decode") if isinstance(getattr(dense, name), Measured)}
    if isinstance(dense.memory.activations, Measured):
        measured.add("memory")
    return {name: MEASUREMENT_MARGIN if name in measured else 0.0 for name in ("memory", "prefill", "decode")}


def smaller_candidates(run: Run, planner: Planner, chosen: Allocation) -> list[Candidate]:
    """Returns smaller candidates for the bundle, in case the device's own figures are worse than what is known here."""
    limits = run.setup.budget.absolute(run.dense.performance).limits
    allocations = planner.smaller(chosen, limits, run.setup.request.rungs - 1)
    return [run.candidate(f"rung-{index}", allocation) for index, allocation in enumerate(allocations, 1)]


def quality_status(run: Run, quality: Quality) -> str:
    """Returns whether the limits on quality are met, missed, or the intervals too wide to tell."""
    return quality.status(run.setup)


def within_quality(
    run: Run, planner: Planner, candidate: Candidate, allocation: Allocation, quality: Quality
) -> tuple[QualityStop, Candidate, Allocation, Quality]:
    """Searches the smallest model within the quality limit, which the budget's candidate exceeds; the dense one at
    worst."""
    dense, budget = run.dense.performance, run.setup.budget
    limits = budget.absolute(dense).limits
    limit = log1p((BROKEN_PERCENT if budget.max_quality_loss is None else budget.max_quality_loss) / 100)
    evaluated: dict[int, tuple[Candidate, Allocation, Quality]] = {}

    def at(share: float) -> Allocation | None:
        """Returns the best allocation on the way from the dense model, at 0, to the budget, at 1."""
        return planner.within(
            {name: dense.values[name] + share * (limit - dense.values[name]) for name, limit in limits.items()}
        )

    def rise_of(quality: Quality) -> TrialRise:
        """Returns the loss; of a task that is nearer to its limit, the same share of the limit on the loss."""
        worst = max(high for _, high in quality.losses(run.setup.request.quality_metric))
        nats = log1p(worst / 100)
        if budget.max_task_drop is not None:
            fallen = max((high for _, high in quality.drops), default=0.0)
            nats = max(nats if budget.max_quality_loss else 0.0, limit * fallen / budget.max_task_drop)
        return TrialRise(nats, quality_status(run, quality))

    def obtain(index: int, allocation: Allocation) -> TrialRise:
        smaller = run.candidate(f"quality-{index + 1}", allocation)
        planner.estimator.correct(allocation, smaller.performance.values)
        evaluated[index] = smaller, allocation, run.evaluator.quality(f"quality-{index + 1}", smaller)
        return rise_of(evaluated[index][2])

    # Try sizes between the dense model and the budget's candidate; keep the smallest that meets the quality limit.
    trials = search_quality(at, limit, (allocation, rise_of(quality)), obtain)
    chosen = _furthest_met(trials)
    if chosen is None:
        kept = run.dense_candidate
        quality_of_dense = run.evaluator.quality("of the dense model", kept)
        evaluated[-1], chosen = (kept, planner.problem.everything, quality_of_dense), -1
    return QualityStop(candidate, quality, len(trials)), *evaluated[chosen]


def _furthest_met(trials: tuple[QualityTrial, ...]) -> int | None:
    met = [index for index, trial in enumerate(trials) if trial.rise.status == "met"]
    return max(met, key=lambda index: trials[index].share, default=None)
