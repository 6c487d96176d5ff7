"""The grade of a fitted model, by the metric that the user lets decide: perplexity, agreement, or a task's score.

What each grade of each metric goes with on the demo model is measured in docs/tasks.md. It knows no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import nan
from typing import Any, Literal

from edgeprune.errors import InputError
from edgeprune.ondevice.budget import BROKEN_PERCENT

Grade = Literal["intact", "degraded", "broken"]
PERPLEXITY, AGREEMENT, TASK = "perplexity", "agreement", "task:"
DEGRADED_PERCENT = 5.0  # rise of perplexity


@dataclass(frozen=True)
class Scale:
    """The losses from which a model is degraded, and broken; unit: of a loss; words: for what is lost."""

    degraded: float
    broken: float
    unit: str
    words: str


SCALES = {
    PERPLEXITY: Scale(DEGRADED_PERCENT, BROKEN_PERCENT, "%", "on the worst held-out set perplexity rises by"),
    AGREEMENT: Scale(10.0, 25.0, "%", "on the worst held-out set the likeliest next token is not the dense model's at"),
    TASK: Scale(2.0, 10.0, "points", "the task's score falls by"),
}


@dataclass(frozen=True)
class Loss:
    """A loss, in the unit of the metric's scale, with its 95 % interval."""

    name: str
    value: float
    low: float
    high: float


def scale_of(metric: str) -> Scale:
    """Returns the scale of a metric, which check_metric found right."""
    return SCALES[TASK if metric.startswith(TASK) else metric]


def check_metric(metric: str, tasks: list[str]) -> None:
    """Raises InputError for a metric that does not exist, or a task that is not asked."""
    if metric in (PERPLEXITY, AGREEMENT) or (metric.startswith(TASK) and metric.removeprefix(TASK) in tasks):
        return
    if metric.startswith(TASK):
        named = f"Name one of them: {', '.join(tasks)}." if tasks else "Add it: --tasks NAME."
        raise InputError(f"--quality-metric {metric} is not among the tasks that are asked", named)
    raise InputError(
        f"unknown quality metric {metric!r}", f"Give {PERPLEXITY}, {AGREEMENT}, or {TASK}NAME with --tasks NAME."
    )


def losses(metric: str, texts: Mapping[str, Any], tasks: Mapping[str, Any] | None) -> list[Loss]:
    """Returns what a model lost by a metric: on each text, or on the task.

    texts, tasks: as pipeline.results.Quality holds them. A text without a place to compare has a loss that is not a
    number, which no limit allows.
    """
    if metric == PERPLEXITY:
        return [Loss(name, text["percent"], text["low"], text["high"]) for name, text in texts.items()]
    if metric == AGREEMENT:
        agreed = {name: text["agreement"] or {"share": nan, "low": nan, "high": nan} for name, text in texts.items()}
        return [
            Loss(name, *(100 * (1 - one[bound]) for bound in ("share", "high", "low"))) for name, one in agreed.items()
        ]
    name = metric.removeprefix(TASK)
    return [drop(name, (tasks or {})[name])]


def drop(name: str, task: Mapping[str, Any]) -> Loss:
    """Returns the points that a task's score fell by."""
    difference = task["difference"]
    return Loss(name, *(-100 * difference[bound] for bound in ("value", "high", "low")))


def worst(losses: list[Loss]) -> Loss:
    """Returns the largest loss; one that is not a number comes before all."""
    return max(losses, key=lambda loss: (loss.value != loss.value, loss.value))


def grade_of(loss: float, metric: str = PERPLEXITY) -> Grade:
    """Returns the grade of a loss in the unit of its metric; one that is not a number is broken."""
    scale = scale_of(metric)
    if loss < scale.degraded:
        return "intact"
    return "degraded" if loss < scale.broken else "broken"


def rule_of(metric: str) -> str:
    """Returns the rule of the grades in words."""
    scale = scale_of(metric)
    return (
        f"Intact: {scale.words} less than {scale.degraded:g} {scale.unit}; degraded: less than {scale.broken:g} "
        f"{scale.unit}; else broken."
    )
