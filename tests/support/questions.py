"""Questions for tests, made up: as a jsonl file, and as a task of lm-evaluation-harness that reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def question_rows(count: int = 12) -> list[dict[str, Any]]:
    """Sums with choices of different lengths."""
    return [
        {
            "question": f"What is {number} and {number}?",
            "choices": [f"it is {2 * number}", f"nothing but {2 * number + 1}", str(number)],
            "answer": number % 3,
        }
        for number in range(count)
    ]


def write_questions(path: Path, count: int = 12) -> Path:
    path.write_text("\n".join(map(json.dumps, question_rows(count))))
    return path


def write_task(path: Path, questions: Path | None, **changes: Any) -> Path:
    """A task of letters with one example before each question; questions: None for a dataset of the hub."""
    task = {
        "task": path.stem,
        "dataset_path": "json" if questions else "someone/questions",
        "dataset_kwargs": {"data_files": {"test": str(questions)}, "cache_dir": str(path.parent)} if questions else {},
        "test_split": "test",
        "fewshot_split": "test",
        "num_fewshot": 1,
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}} A. {{choices[0]}} B. {{choices[1]}} C. {{choices[2]}} Answer:",
        "doc_to_choice": ["A", "B", "C"],
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        **changes,
    }
    path.write_text(json.dumps({name: value for name, value in task.items() if value is not None}))  # JSON is YAML
    return path
