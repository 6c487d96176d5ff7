"""Task scores of two models on the same questions, and the interval of their difference.

It knows no model: lm-evaluation-harness asks the questions in harness.py, which needs the extra `eval`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.errors import InputError
from edgeprune.evaluate.agreement import NORMAL_95, wilson
from edgeprune.files import parse_json, printable, read_text

FILES = (".yaml", ".yml", ".jsonl")  # of a task's own definition
FORM = 'Write one question a line: {"question": "...", "choices": ["...", "..."], "answer": 0}'


@dataclass(frozen=True)
class Score:
    """The mean score of a model on questions, 0 to 1, with the 95 % score interval of a share (Wilson 1927)."""

    share: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """The mean of a second model's scores less the first's on the same questions, -1 to 1, with its 95 % interval."""

    value: float
    low: float
    high: float


def score(scores: np.ndarray) -> Score:
    """Returns the mean of the scores (questions,) of one model, 0 to 1 each.

    The interval of graded scores is that of a share of the same mean, which is never too narrow.
    """
    return Score(float(scores.mean()), *wilson(float(scores.sum()), len(scores)))


def difference(dense: np.ndarray, fitted: np.ndarray) -> Difference:
    """Returns the difference of the scores (questions,) of two models on the same questions, 0 to 1 each.

    The interval is Bonett and Price's for paired proportions (2012): Wald's with one more question that each model
    alone answers. It holds for few questions, and where both models answer all of them alike. Of graded scores the same
    two are added to the differences.
    """
    differences = np.append(fitted - dense, [1.0, -1.0])
    reach = NORMAL_95 * differences.std() / sqrt(len(differences))
    middle = differences.mean()
    return Difference(float((fitted - dense).mean()), max(-1.0, middle - reach), min(1.0, middle + reach))


def names_of(asked: str) -> list[str]:
    """Returns the names and files of --tasks, each once. Raises InputError where there is none."""
    names = list(dict.fromkeys(name.strip() for name in asked.split(",") if name.strip()))
    if not names:
        raise InputError("--tasks is empty", "Name tasks of lm-evaluation-harness, or a .jsonl or .yaml file.")
    return names


def is_file(name: str) -> bool:
    """Returns whether a task is a file's own, by the end of its name."""
    return Path(name).suffix.lower() in FILES


def title_of(name: str) -> str:
    """Returns the name of a task: of a file its own without the ending."""
    return Path(name).stem if is_file(name) else name


def check_questions(count: int | None) -> None:
    """Raises InputError for a number of questions below 1."""
    if count is not None and count < 1:
        raise InputError(f"--questions {count} is less than 1", "Give a positive number, or leave it out for all.")


def read_questions(path: Path) -> list[dict[str, Any]]:
    """Returns the questions of a jsonl file: question, choices, and the place of the answer among them.

    Raises InputError, which names the line, for what is no such question.
    """
    questions = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if line.strip():
            questions.append(
                _question(parse_json(line, f"{path}, line {number},", remedy=FORM), f"{path}, line {number}")
            )
    if not questions:
        raise InputError(f"{path} holds no question", FORM)
    return questions


def _question(row: dict[str, Any], place: str) -> dict[str, Any]:
    """Returns a question as the harness takes it. Raises InputError where it is none."""
    question, choices, answer = (row.get(name) for name in ("question", "choices", "answer"))
    if not isinstance(question, str) or not question.strip():
        raise InputError(f"{place}: question is no text", FORM)
    texts = choices if isinstance(choices, list) else []
    if len(texts) < 2 or not all(isinstance(text, str) and text.strip() for text in texts):
        raise InputError(f"{place}: choices are no list of two texts or more", FORM)
    if len(set(texts)) < len(texts):
        raise InputError(f"{place}: two of the choices are the same", FORM)
    index = texts.index(answer) if answer in texts else answer
    if type(index) is not int or not 0 <= index < len(texts):
        raise InputError(
            f"{place}: answer {printable(repr(answer), 60)} is none of the {len(texts)} choices, nor its number from 0",
            FORM,
        )
    return {"question": question, "choices": texts, "answer": index}
