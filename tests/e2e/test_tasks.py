"""A fit with tasks: both models answer the same questions, in the report, in the limits, and again from the bundle."""

import json
import shutil

import pytest

import edgeprune
from edgeprune.bundle.pick import pick
from edgeprune.bundle.read import read_report
from edgeprune.errors import InputError
from edgeprune.pipeline.request import request_of
from edgeprune.pipeline.setup import prepare
from tests.support import bundles, runs
from tests.support.questions import write_questions


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A bundle whose grade a task decides, and the questions."""
    home, folder = runs.home(tmp_path_factory), tmp_path_factory.mktemp("tasks")
    own = write_questions(folder / "own.jsonl")
    asked = {"tasks": str(own), "questions": 8, "max_task_drop": 99, "quality_metric": "task:own", "context": 64}
    asked |= {"weights": "float", "cache": "float"}  # the search is not what is tested
    with runs.short_durations():
        result = edgeprune.fit(**runs.options(home, folder / "bundle", **asked))
    return result, own


@pytest.mark.slow
def test_the_report_holds_the_scores_the_limits_and_the_grade(fitted):
    result, own = fitted
    report = result.report
    (task,) = report.quality.tasks
    assert (task.name, task.metric, task.questions) == ("own", "acc_norm", 8)
    assert task.difference.points == pytest.approx(task.fitted.percent - task.dense.percent)
    assert report.quality.metric == "task:own"
    lost = -task.difference.points
    assert report.quality.grade == ("intact" if lost < 2 else "degraded" if lost < 10 else "broken")
    broken, asked = (row for row in report.budget if row.name == "tasks")
    assert [(row.limit, row.unit) for row in (broken, asked)] == [(10.0, "points"), (99.0, "points")]
    assert asked.fitted.value == pytest.approx(lost) and asked.status == "met"
    assert not [row for row in report.budget if row.name == "quality"]
    assert f'tasks = "{own}"' in (result.bundle / "run.toml").read_text()
    assert "--quality-metric task:own" in report.command
    page = (result.bundle / "report.html").read_text()
    assert "Scores on tasks" in page and "the task&#39;s score falls by" in page


def test_the_bundle_answers_as_it_did_in_the_fit(fitted):
    """The dense model is found by run.toml; its weights answer as its graph did."""
    result, own = fitted
    found = edgeprune.task_scores(result.bundle, tasks=str(own), questions=8).report
    assert found.tasks == result.report.quality.tasks
    assert (found.dense, found.context) == ("model", 64)
    assert found.judged == "the graph dequantised, in ONNX Runtime"


@pytest.mark.slow
def test_every_rung_of_a_frontier_answers_and_reads_odd_input(tmp_path_factory, tmp_path):
    home, own = runs.home(tmp_path_factory), write_questions(tmp_path / "own.jsonl")
    asked = {"tasks": str(own), "questions": 8, "context": 64, "memory": None, "weights": "float", "cache": "float"}
    result = edgeprune.frontier(**runs.options(home, tmp_path / "out", **asked), rungs=2)
    assert [[(task.name, task.questions) for task in rung.tasks] for rung in result.report.rungs] == [[("own", 8)]] * 2
    report = read_report(pick(result.bundle, 1, tmp_path / "picked"))
    assert report.quality.tasks == result.report.rungs[1].tasks
    assert report.robustness.variants
    assert result.report.rungs[1].finding == report.robustness.finding
    assert f'tasks = "{own}"' in (result.bundle / "run.toml").read_text()


def test_a_bundle_whose_model_is_gone_or_another_asks_for_it(fitted, tmp_path):
    result, own = fitted
    bundle = bundles.copy_of(result.bundle, tmp_path / "bundle")
    shutil.copytree(runs._homes[0] / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(
        (tmp_path / "model" / "config.json").read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05')
    )
    assert config
    for name, message in (("gone", "is not at"), ("model", "is not the model that")):
        bundles.rewrite(bundle, "run.toml", f'model = "{tmp_path / name}"\n'.encode())
        with pytest.raises(InputError, match=message) as caught:
            edgeprune.task_scores(bundle, tasks=str(own))
        assert "--dense MODEL" in caught.value.remedy


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_task_drop": 2}, "--max-task-drop without --tasks"),
        ({"questions": 2}, "--questions without --tasks"),
        ({"quality_metric": "task:own"}, "task:own is not among the tasks"),
        ({"quality_metric": "taste"}, "unknown quality metric 'taste'"),
        ({"tasks": "nowhere.jsonl"}, "there is no file nowhere.jsonl"),
        ({"tasks": "nowhere.jsonl", "max_task_drop": "0"}, "'0' on tasks is not a number of points"),
        ({"tasks": "nowhere.jsonl", "max_task_drop": "much"}, "'much' on tasks is not a number of points"),
    ],
)
def test_bad_input_is_refused_before_the_model_is_read(tmp_path_factory, tmp_path, monkeypatch, changes, message):
    from edgeprune.pipeline import setup

    home = runs.home(tmp_path_factory)
    monkeypatch.setattr(setup, "load_dense", None)
    with pytest.raises(InputError, match=message) as caught:
        prepare(request_of(**runs.options(home, tmp_path / "out", **changes)))
    assert caught.value.remedy
