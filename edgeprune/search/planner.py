"""The allocation problem of a run, made of loss and cost tables, and its solutions.

It does not know how the tables were measured, nor what a chosen candidate turns out to cost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from edgeprune.search.latency_table import LatencyCosts
from edgeprune.search.search import Corrected
from edgeprune.search.widths import Sensitivities

if TYPE_CHECKING:
    from edgeprune.search.solve import Allocation, Problem

STEP = 0.05  # share by which a limit is raised to see what more of it would gain
RUNG_STEP = 0.15  # share of what pruning can still take from the chosen candidate, for each rung
SHARE_STEPS = 6  # steps of the bisection for the end of a frontier
ROUNDING = 1e-9  # by which a sum of costs may differ from itself in another order
LEAST_GAIN = 1e-4  # nats per token


UNUSABLE = 1e3  # nats per token: the loss of a cut that is not to be chosen


@dataclass(frozen=True)
class Lever:
    """One way to make the model smaller, and what it contributes; name: pruning, vocabulary, a weight format, or the
    KV cache in its format."""

    name: str
    saved_bytes: float
    nats: float


@dataclass(frozen=True)
class Levers:
    """All levers of an allocation, and the predicted loss of one kind of lever alone at no more than its costs and
    within the limits, None where that does not reach them."""

    parts: tuple[Lever, ...]
    pruning_alone: float | None
    precision_alone: float | None


@dataclass(frozen=True)
class Planner:
    """The problem of a run in its layout, the table of latencies in it, and the correction of its estimates."""

    problem: Problem
    layout: str
    latency: LatencyCosts
    estimator: Corrected

    def solve(self, room: Mapping[str, float]) -> Allocation | None:
        """Returns the allocation of the least predicted loss within limits on the estimates; None where none fits."""
        from edgeprune.search.solve import per_layer, uniform

        return (uniform if self.layout == "uniform" else per_layer)(self.problem, room)

    def within(self, limits: Mapping[str, float]) -> Allocation | None:
        """Returns the best allocation within limits on the obtained costs, as the estimates are corrected so far."""
        return self.solve(self.estimator.room(limits))

    def gains(self, limits: Mapping[str, float], chosen: Allocation) -> dict[str, float]:
        """Returns the nats per token that raising each limit by STEP would save over the chosen allocation.

        A constraint whose raising saves nothing is not active: another one decides.
        """
        loss = min(chosen.loss, best.loss) if (best := self.within(limits)) else chosen.loss
        gains = {}
        for name, limit in limits.items():
            raised = self.within({**limits, name: limit * (1 + STEP)})
            gain = 0.0 if raised is None else loss - raised.loss
            gains[name] = gain if gain > LEAST_GAIN else 0.0
        return gains

    def smaller(self, chosen: Allocation, limits: Mapping[str, float], count: int) -> list[Allocation]:
        """Returns up to `count` allocations below the chosen one, each RUNG_STEP smaller than the one before.

        The steps are shares of what pruning can still take from the chosen one. There are fewer allocations where the
        width grid ends or holds no new one. All of them have the chosen vocabulary: a bundle has one tokenizer.
        """
        estimated = self.problem.estimate(chosen)
        vocabulary = {chosen.vocab_size: self.problem.vocabularies[chosen.vocab_size]}
        planner = replace(self, problem=replace(self.problem, vocabularies=vocabulary))
        floor = self.problem.estimate(planner.problem.smallest)
        rungs: list[Allocation] = []
        for step in range(1, count + 1):
            left = 1 - RUNG_STEP * step
            best = planner.solve({name: floor[name] + left * (estimated[name] - floor[name]) for name in limits})
            if best is not None and best.choice not in [chosen.choice, *(rung.choice for rung in rungs)]:
                rungs.append(best)
        return rungs

    def shares(self, name: str, count: int, most_loss: float) -> list[float]:
        """Returns `count` shares of the dense model's cost, in equal steps down to the last one of a frontier.

        At the last share the predicted loss reaches `most_loss` nats per token. name: of the cost that is limited.
        """
        dense = self.estimator.predict(self.problem.everything)[name]
        low, high = 0.0, 1.0
        for _ in range(SHARE_STEPS):
            middle = (low + high) / 2
            best = self.within({name: middle * dense})
            low, high = (low, middle) if best is not None and best.loss <= most_loss else (middle, high)
        return [1 - (1 - high) * (step + 1) / count for step in range(count)]

    def levers(self, limits: Mapping[str, float], chosen: Allocation) -> Levers:
        """Returns what each lever contributes to the chosen allocation; limits: on the obtained costs."""
        problem = self.problem
        # From the dense model on, one lever after the other.
        steps = [("vocabulary", replace(problem.everything, vocab_size=chosen.vocab_size))]
        steps.append(("pruning", replace(steps[0][1], layers=chosen.layers)))
        for form in problem.formats[1:]:
            last = steps[-1][1]
            formats = [
                tuple(mine if mine == form else before for mine, before in zip(pair, done, strict=True))
                for pair, done in zip(_pairs(chosen), _pairs(last), strict=True)
            ]
            tables = [mine if mine == form else done for mine, done in zip(chosen.tables, last.tables, strict=True)]
            steps.append((form.name, replace(last, formats=tuple(formats), tables=tuple(tables))))
        if chosen.cache is not None:
            steps.append((f"KV cache in {chosen.cache.name}", replace(steps[-1][1], cache=chosen.cache)))
        parts, before = [], problem.everything
        for name, step in steps:
            saved = problem.estimate(before)["memory"] - problem.estimate(step)["memory"]
            if step.choice != before.choice:
                parts.append(Lever(name, saved, problem.loss(step) - problem.loss(before)))
            before = step
        pruning, precision = self.one_kind(limits, chosen)
        is_usable = precision is not None and precision.loss < UNUSABLE
        return Levers(tuple(parts), pruning and pruning.loss, precision.loss if is_usable else None)

    def one_kind(self, limits: Mapping[str, float], chosen: Allocation) -> tuple[Allocation | None, Allocation | None]:
        """Returns the best allocation by pruning alone and that by formats alone, without the room that the chosen one
        leaves: they would seem to lose less than both kinds. None: nothing fits, or there are no formats."""
        problem = self.problem
        costs = problem.estimate(chosen)
        room = {name: min(most, costs[name] * (1 + ROUNDING)) for name, most in self.estimator.room(limits).items()}
        in_floats = replace(problem, layer_formats=(0,), table_formats=(0,), caches={None: problem.costs})
        vocabulary = {max(problem.vocabularies): 0.0}
        whole = replace(problem, sensitivities=uncut(problem.sensitivities), vocabularies=vocabulary)
        has_formats = len(problem.formats) > 1 or any(problem.cache_formats)
        precision = replace(self, problem=whole).solve(room) if has_formats else None
        return replace(self, problem=in_floats).solve(room), precision


def _pairs(allocation: Allocation) -> tuple:
    return allocation.formats or ((None, None),) * len(allocation.layers)


def uncut(sensitivities: Sensitivities) -> Sensitivities:
    """Returns sensitivities by which every cut costs more than any model is worth."""
    attention, mlp = (np.full_like(losses, UNUSABLE) for losses in (sensitivities.attention, sensitivities.mlp))
    attention[:, -1, -1] = mlp[:, -1] = 0.0
    return replace(sensitivities, attention=attention, mlp=mlp, response=np.ones(3))
