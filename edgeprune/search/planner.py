"""What a run chooses from: losses, costs of the engine or the estimator, vocabularies; and the best choice in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from edgeprune.search.latency_table import LatencyCosts
from edgeprune.search.search import Corrected

if TYPE_CHECKING:
    from edgeprune.search.solve import Allocation, Problem

STEP = 0.05  # of a limit: what one more unit of it would buy
RUNG_STEP = 0.15  # of what pruning can still take from the chosen candidate, from one rung to the next
SHARE_STEPS = 6  # of the bisection for the end of a frontier
LEAST_GAIN = 1e-4  # nats per token


@dataclass(frozen=True)
class Planner:
    """The problem of a run in its layout, and where its costs come from."""

    problem: Problem
    layout: str
    latency: LatencyCosts
    estimator: Corrected

    def solve(self, room: Mapping[str, float]) -> Allocation | None:
        """The least predicted loss within limits on the estimates; None where nothing fits."""
        from edgeprune.search.solve import per_layer, uniform

        return (uniform if self.layout == "uniform" else per_layer)(self.problem, room)

    def within(self, limits: Mapping[str, float]) -> Allocation | None:
        """The same for limits on what is obtained, as far as the estimates are corrected by now."""
        return self.solve(self.estimator.room(limits))

    def gains(self, limits: Mapping[str, float], chosen: Allocation) -> dict[str, float]:
        """Nats per token that STEP more of each limit would save over what is chosen within them.

        A constraint that buys nothing is not active: another one decides.
        """
        loss = min(chosen.loss, found.loss) if (found := self.within(limits)) else chosen.loss
        gains = {}
        for name, limit in limits.items():
            found = self.within({**limits, name: limit * (1 + STEP)})
            gain = 0.0 if found is None else loss - found.loss
            gains[name] = gain if gain > LEAST_GAIN else 0.0
        return gains

    def smaller(self, chosen: Allocation, limits: Mapping[str, float], count: int) -> list[Allocation]:
        """Up to `count` allocations below the chosen one, each with RUNG_STEP less of what is prunable than the one
        before; fewer where the width grid ends or holds nothing new."""
        estimated = self.problem.estimate(chosen)
        tokens = {chosen.vocab_size: self.problem.vocabularies[chosen.vocab_size]}  # the bundle has one tokenizer
        planner = replace(self, problem=replace(self.problem, vocabularies=tokens))
        floor = self.problem.estimate(planner.problem.smallest)
        found: list[Allocation] = []
        for step in range(1, count + 1):
            left = 1 - RUNG_STEP * step
            best = planner.solve({name: floor[name] + left * (estimated[name] - floor[name]) for name in limits})
            if best is not None and best.layers not in [chosen.layers, *(rung.layers for rung in found)]:
                found.append(best)
        return found

    def shares(self, name: str, count: int, most_loss: float) -> list[float]:
        """Of what the dense model costs, in equal steps down to where the predicted loss reaches `most_loss` nats."""
        dense = self.estimator.predict(self.problem.everything)[name]
        low, high = 0.0, 1.0
        for _ in range(SHARE_STEPS):
            middle = (low + high) / 2
            found = self.within({name: middle * dense})
            low, high = (low, middle) if found is not None and found.loss <= most_loss else (middle, high)
        return [1 - (1 - high) * (step + 1) / count for step in range(count)]
