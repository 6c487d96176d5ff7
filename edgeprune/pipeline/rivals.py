"""The candidates within the budget that a recovery trains, of which the best afterwards is kept.

What training wins back differs by what was lost: pruned channels come back otherwise than rounded weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgeprune.ondevice.budget import judge
from edgeprune.pipeline.results import Candidate, Quality, Rival
from edgeprune.pipeline.stages import Run
from edgeprune.search.planner import Planner
from edgeprune.search.search import Outcome
from edgeprune.search.solve import Allocation


@dataclass(frozen=True)
class Recovered:
    """The best candidate after a recovery; rivals: all that were trained, the best first, none where it was one."""

    candidate: Candidate
    allocation: Allocation
    quality: Quality
    rivals: tuple[Rival, ...] = ()


def best_recovered(run: Run, planner: Planner, outcome: Outcome, chosen: Candidate) -> Recovered:
    """Returns the best of the search's candidates after their recovery: `chosen` where no others are asked for.

    The chosen one comes first, then the best by pruning alone and by formats alone, then the search's others; each is
    built and measured, and those beyond the budget are left out.
    """
    trial, wanted = outcome.trials[outcome.chosen], run.setup.request.recover_candidates
    if wanted == 1 or trial.obtained.status != "met":
        recovered = run.recovered(chosen)
        return Recovered(recovered, trial.allocation, run.evaluator.quality("0", recovered))
    tried = [("chosen by the search", chosen, trial.allocation)]
    tried += _others(run, planner, outcome)
    found, metric = [], run.setup.request.quality_metric
    for index, (name, candidate, allocation) in enumerate(tried[:wanted]):
        before = run.evaluator.quality(f"rival {index}", candidate)
        recovered = run.recovered(candidate)
        after = run.evaluator.quality(f"rival {index} recovered", recovered)
        rival = Rival(name, _loss(before, metric), _loss(after, metric))
        found.append(Recovered(recovered, allocation, after, (rival,)))
    if len(found) < wanted:
        run.progress.note(f"{len(found)} of {wanted} candidates to recover were found within the budget")
    found.sort(key=lambda one: one.rivals[0].after)
    best = found[0]
    return Recovered(best.candidate, best.allocation, best.quality, tuple(one.rivals[0] for one in found))


def _others(run: Run, planner: Planner, outcome: Outcome) -> list[tuple[str, Candidate, Allocation]]:
    """Returns other candidates within the budget than the chosen one, with the words that name them."""
    wanted, dense = run.setup.request.recover_candidates - 1, run.dense.performance
    limits = run.setup.budget.absolute(dense).limits
    allocation = outcome.trials[outcome.chosen].allocation
    kinds = (("pruned alone", "rival-pruned"), ("in formats alone", "rival-formats"))
    of_kinds = zip(kinds, planner.one_kind(limits, allocation), strict=True)
    options = [(*names, one) for names, one in of_kinds if one is not None]
    met = [(i, trial) for i, trial in enumerate(outcome.trials) if trial.obtained.status == "met"]
    met.sort(key=lambda numbered: numbered[1].allocation.loss)
    options += [(f"candidate {i + 1} of the search", f"candidate-{i + 1}", trial.allocation) for i, trial in met]
    others, seen = [], {allocation.choice}
    for words, name, one in options:
        if len(others) == wanted or one.choice in seen:
            continue
        seen.add(one.choice)
        candidate = run.candidate(name, one)
        if judge(run.setup.budget, dense, candidate.performance).met:
            others.append((words, candidate, one))
    return others


def _loss(quality: Quality, metric: str) -> float:
    """Returns the worst loss by a metric: the middle of its interval."""
    return max((low + high) / 2 for low, high in quality.losses(metric))
