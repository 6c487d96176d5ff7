"""The tasks that were asked for, the scores of a model question by question, and the comparison of two models.

It knows neither runs nor bundles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune.errors import InputError
from edgeprune.evaluate.tasks import difference, is_file, names_of, score
from edgeprune.model.tokens.tokenizer import load_tokenizer
from edgeprune.progress import Progress

if TYPE_CHECKING:
    from edgeprune.evaluate.harness import Task
    from edgeprune.evaluate.likelihoods import Likelihoods

INSTALL = 'Install it with: pip install "edgeprune[eval]"'


def load_tasks(asked: str, note: Callable[[str], None]) -> list[Task]:
    """Returns the tasks of --tasks with their questions; note: called before questions are downloaded.

    Raises InputError where lm-evaluation-harness is not installed, and for tasks that cannot be scored.
    """
    names = names_of(asked)
    for name in names:
        if is_file(name) and not Path(name).is_file():
            raise InputError(f"there is no file {name}", "Give the path of a .jsonl or .yaml file.")
    try:
        from edgeprune.evaluate.harness import load
    except ImportError as error:
        raise InputError(f"lm-evaluation-harness is not installed: no module {error.name}", INSTALL) from None
    tasks = [load(name, note) for name in names]
    titles = [task.name for task in tasks]
    if again := next((title for title in titles if titles.count(title) > 1), None):
        raise InputError(f"two of the tasks are named {again}", "Rename one of the files.")
    return tasks


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
