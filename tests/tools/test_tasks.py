import json

import numpy as np
import pytest

from edgeprune.evaluate.tasks import difference, read_questions
from edgeprune.pipeline.task_scores import load_tasks
from tools.tasks import DENSE, MODELS, TASKS, Model, meaning_table, packaged_questions, scores_table, sentence_questions

TEXTS = [
    " ".join(f"This is sentence number {number} of the long text called {name}." for number in range(12))
    for name in ("one", "two", "three")
]


def test_the_questions_that_install_with_the_harness_can_be_asked(tmp_path):
    questions = packaged_questions()
    (tmp_path / "mmlu.jsonl").write_text("\n".join(map(json.dumps, questions)))
    assert read_questions(tmp_path / "mmlu.jsonl") == questions
    assert len(questions) > 270 and {len(question["choices"]) for question in questions} == {4}
    assert np.bincount([question["answer"] for question in questions]).min() > 40
    assert not any("Let's think" in text for question in questions for text in question["choices"])
    (task,) = load_tasks(str(tmp_path / "mmlu.jsonl"), print)
    assert len(task.parts["mmlu"].eval_docs) == len(questions)


def test_the_sentence_that_follows_is_among_the_choices_and_the_others_are_from_elsewhere():
    questions = sentence_questions(TEXTS, 5, 0)
    assert len(questions) == 5 and questions == sentence_questions(TEXTS, 5, 0)
    for question in questions:
        own = next(text for text in TEXTS if question["question"] in text)
        right = question["choices"][question["answer"]]
        assert f"{question['question']} {right}" in own
        assert not any(choice in own for choice in question["choices"] if choice != right)


def row(scores, nats, share):
    return {
        "scores": dict.fromkeys(TASKS, scores),
        "nats": {"speeches": nats, "handbook": nats},
        "tokens": {"speeches": [100, 100], "handbook": [100, 100]},
        "agreement": dict.fromkeys(("speeches", "handbook"), {"share": share, "low": share, "high": share}),
    }


def test_the_tables_hold_the_models_that_were_run():
    int8 = Model(form="int8")
    cells = {DENSE.key: row([1, 0, 1, 1], [300.0, 300.0], 1.0), int8.key: row([1, 0, 0, 1], [310.0, 310.0], 0.9)}
    lines = scores_table(cells).splitlines()
    assert len(lines) == 4 and "% of 4" in lines[0]
    lost = difference(np.array([1, 0, 1, 1]), np.array([1, 0, 0, 1]))
    assert f"-25.0 [{100 * lost.low:+.1f}, {100 * lost.high:+.1f}]" in lines[3] and lines[3].startswith("| int8 |")
    (line,) = meaning_table(cells).splitlines()[2:]
    assert f"{100 * np.expm1(0.1):+.1f}" in line and "90.0 [90.0, 90.0]" in line
    assert scores_table({}).count("\n") == 1
    assert len({model.key for model in MODELS}) == len(MODELS)
    with pytest.raises(KeyError):
        scores_table({DENSE.key: {}})
