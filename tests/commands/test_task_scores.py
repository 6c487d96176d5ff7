import numpy as np
import pytest

import edgeprune
from edgeprune.errors import InputError
from edgeprune.evaluate.tasks import difference
from edgeprune.report.tasks import TaskScores
from tests.support.checkpoints import save_llama
from tests.support.commands import run
from tests.support.llamagen import random_llamagen, save_directory
from tests.support.questions import write_questions


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_llama(folder / "dense")
    save_llama(folder / "other", seed=1, initializer_range=0.5)
    write_questions(folder / "own.jsonl")
    return folder


def test_a_model_alone_has_scores_and_no_difference(folder):
    result = edgeprune.task_scores(folder / "dense", tasks=str(folder / "own.jsonl"))
    (task,) = result.report.tasks
    assert result.bundle is None and result.report.dense is None
    assert (task.questions, task.dense, task.difference) == (12, None, None)
    assert task.fitted.low_percent <= task.fitted.percent <= task.fitted.high_percent


def test_two_models_are_paired_question_by_question_and_each_answers_once(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("EDGEPRUNE_CACHE", str(tmp_path / "cache"))  # where no earlier run kept answers
    from edgeprune.commands import task_scores as command

    asked, seen = command.scores_of, []

    def scores(task, likelihoods, tokenizer, questions, name, progress):
        seen.append(asked(task, likelihoods, tokenizer, questions, name, progress))
        return seen[-1]

    monkeypatch.setattr(command, "scores_of", scores)
    arguments = {"tasks": str(folder / "own.jsonl"), "dense": folder / "dense", "questions": 10}
    first = edgeprune.task_scores(folder / "other", **arguments).report
    dense, fitted = (np.array(values) for values in seen)
    expected = difference(dense, fitted)
    (task,) = first.tasks
    assert task.questions == 10 and np.any(dense != fitted)
    assert task.difference.points == pytest.approx(100 * expected.value)
    assert task.difference.low_points == pytest.approx(100 * expected.low)
    assert (task.dense.percent, task.fitted.percent) == pytest.approx((100 * dense.mean(), 100 * fitted.mean()))
    # A second call reads what the first one kept; other questions are asked.
    again = edgeprune.task_scores(folder / "other", **arguments).report
    assert again.tasks == first.tasks and len(seen) == 2
    edgeprune.task_scores(folder / "other", **arguments | {"questions": 9})
    assert len(seen) == 4


def test_both_models_have_the_room_of_the_smaller_one(folder, tmp_path):
    save_llama(tmp_path / "short", max_position_embeddings=24)
    tasks = str(folder / "own.jsonl")
    report = edgeprune.task_scores(folder / "dense", tasks=tasks, dense=tmp_path / "short").report
    assert report.context == 24
    assert edgeprune.task_scores(folder / "dense", tasks=tasks).report.context == 256


def test_the_command_line_prints_a_table_and_json(folder):
    result = run("evaluate", folder / "other", "--dense", folder / "dense", "--tasks", folder / "own.jsonl", "--json")
    assert result.returncode == 0, result.stderr
    report = TaskScores.model_validate_json(result.stdout)
    assert [(task.name, task.metric) for task in report.tasks] == [("own", "acc_norm")]
    assert report.dense == "dense" and "it/s" not in result.stderr


def test_the_table_fits_eighty_columns(folder, capsys):
    from rich.console import Console

    from edgeprune.report.terminal import print_task_scores

    report = edgeprune.task_scores(folder / "other", tasks=str(folder / "own.jsonl"), dense=folder / "dense").report
    print_task_scores(report, Console(width=80))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("own") and line.rstrip().endswith("neither") for line in lines)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ""}, "--tasks is empty"),
        ({"tasks": "nowhere.jsonl"}, "there is no file nowhere.jsonl"),
        ({"questions": 0}, "--questions 0 is less than 1"),
        ({"dense": "nowhere"}, "nowhere"),
        ({"model": "nowhere"}, "nowhere"),
        ({"model": "pictures"}, "is an image generator"),
    ],
)
def test_bad_input_is_refused_before_any_work(folder, monkeypatch, changes, message):
    from edgeprune.commands import task_scores as command

    if changes.get("model") == "pictures":
        save_directory(random_llamagen(vocabulary=64, layers=1, side=4), folder / "pictures")
        changes = {"model": folder / "pictures"}
    monkeypatch.setattr(command, "load_model", None)
    arguments = {"model": folder / "dense", "tasks": str(folder / "own.jsonl"), **changes}
    with pytest.raises(InputError, match=message) as caught:
        edgeprune.task_scores(**arguments)
    assert caught.value.remedy
