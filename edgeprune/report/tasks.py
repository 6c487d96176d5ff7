"""The scores of two models on tasks, as documents hold them and as people read them. It evaluates nothing itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from edgeprune.report.base import Strict


class Share(Strict):
    """The mean score of one model on a task's questions."""

    percent: float
    low_percent: float = Field(description="lower bound of Wilson's 95 % interval over questions")
    high_percent: float


class Points(Strict):
    """The fitted model's score less the dense one's, in points of percent."""

    points: float
    low_points: float = Field(
        description="lower bound of the 95 % interval over the same questions (Bonett and Price 2012, paired)"
    )
    high_points: float


class TaskScore(Strict):
    """The scores of a task of lm-evaluation-harness, or of a file's own questions."""

    name: str
    metric: str = Field(description="of the harness, a mean over questions: acc_norm where the task has it")
    questions: int
    dense: Share | None = Field(description="none: no dense model was named")
    fitted: Share
    difference: Points | None = Field(description="none: no dense model was named")


class TaskScores(Strict):
    """The document that `edgeprune evaluate --json` prints; all figures are measured on this machine."""

    edgeprune: str = Field(description="version")
    created: str = Field(description="UTC, ISO 8601")
    model: str
    dense: str | None = Field(description="none: no dense model was named")
    judged: str = Field(description="what of the model answered")
    context: int = Field(description="tokens that a question may have; longer ones lose their beginning")
    tasks: list[TaskScore]


def task_score(name: str, result: Mapping[str, Any]) -> TaskScore:
    """Returns the report's form of pipeline.task_scores' result of a task."""

    def percent(part: str, unit: str, middle: str) -> dict[str, float] | None:
        if (one := result[part]) is None:
            return None
        return {unit: 100 * one[middle]} | {f"{bound}_{unit}": 100 * one[bound] for bound in ("low", "high")}

    return TaskScore(
        name=name,
        metric=result["metric"],
        questions=result["questions"],
        dense=percent("dense", "percent", "share"),
        fitted=percent("fitted", "percent", "share"),
        difference=percent("difference", "points", "value"),
    )


def points_text(difference: Points | None) -> str:
    """Returns `-1.4 points (-4.0 to +1.2)`; empty where no dense model was named."""
    if difference is None:
        return ""
    return f"{difference.points:+.1f} points ({difference.low_points:+.1f} to {difference.high_points:+.1f})"


def shown_text(difference: Points) -> str:
    """Returns in words what the interval of a difference shows."""
    if difference.high_points < 0:
        return "worse"
    return "better" if difference.low_points > 0 else "neither"


TASK_COLUMNS = ("task", "score", "questions", "dense", "fitted", "difference", "shown")


def task_row(task: TaskScore) -> tuple[str, ...]:
    """Returns the cells of a task in a table of TASK_COLUMNS; the interval is that of the last figure."""
    own, named = task.fitted, (task.name, task.metric, f"{task.questions:,}")
    if task.dense is None or task.difference is None:
        return (*named, "–", f"{own.percent:.1f} % ({own.low_percent:.1f} to {own.high_percent:.1f} %)", "–", "")
    figures = (f"{task.dense.percent:.1f} %", f"{own.percent:.1f} %", points_text(task.difference))
    return (*named, *figures, shown_text(task.difference))


def task_text(task: TaskScore) -> str:
    """Returns `arc_easy: 41.1 % (dense 42.5 %), -1.4 points (-4.0 to +1.2), 282 questions, measured`."""
    name, *_, dense, fitted, lost, _ = task_row(task)
    return f"{name}: {fitted} (dense {dense}), {lost}, {task.questions:,} questions, measured"
