"""The scores of a model on tasks, question by question, and the comparison of two models' scores.

It knows neither runs nor bundles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune.evaluate.tasks import difference, score
from edgeprune.model.tokens.tokenizer import load_tokenizer
from edgeprune.progress import Progress

if TYPE_CHECKING:
    from edgeprune.evaluate.harness import Task
    from edgeprune.evaluate.likelihoods import Likelihoods


def task_scores(
    task: Task, likelihoods: Likelihoods, tokenizer: Path, questions: int | None, name: str, progress: Progress
) -> list[float]:
    """Returns the score of each question of a task, 0 to 1.

    tokenizer: its folder; questions: of each part of the task, at most; name: of the model, for the progress.
    """
    from edgeprune.evaluate.harness import HarnessModel, scores

    model = HarnessModel(
        likelihoods, load_tokenizer(tokenizer), lambda count: progress.stage(f"{name}: {task.name}", count)
    )
    values = scores(task, model, questions)
    if model.cut:
        progress.note(
            f"{task.name}: {model.cut} of the {name} model's contexts lost their beginning, for more than "
            f"{likelihoods.capacity} tokens"
        )
    return values.tolist()


def compared(task: Task, dense: Sequence[float] | None, fitted: Sequence[float]) -> dict[str, Any]:
    """Returns what documents hold of a task: metric, questions, both scores and the difference, as JSON."""
    before, after = None if dense is None else np.array(dense), np.array(fitted)
    return {
        "metric": task.metric,
        "questions": len(after),
        "dense": None if before is None else asdict(score(before)),
        "fitted": asdict(score(after)),
        "difference": None if before is None else asdict(difference(before, after)),
    }
