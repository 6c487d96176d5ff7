import pytest

from edgeprune.evaluate.grades import rule_of
from edgeprune.report.tasks import Points, points_text, shown_text, task_row, task_score, task_text
from edgeprune.report.verdict import broken_text, cost_text, is_broken
from tests.support.sample_reports import measured_content, report_of

RESULT = {
    "metric": "acc",
    "questions": 1200,
    "dense": {"share": 0.5, "low": 0.47, "high": 0.53},
    "fitted": {"share": 0.375, "low": 0.35, "high": 0.40},
    "difference": {"value": -0.125, "low": -0.15, "high": -0.1},
}


def with_task(**changes):
    content = measured_content()
    content["quality"] |= {"tasks": [task_score("own", RESULT)], **changes}
    return report_of(content)


@pytest.mark.parametrize(("low", "high", "words"), [(-3, -1, "worse"), (1, 2, "better"), (-1, 1, "neither")])
def test_the_interval_says_what_was_shown(low, high, words):
    points = Points(points=(low + high) / 2, low_points=low, high_points=high)
    assert shown_text(points) == words
    assert points_text(points) == f"{(low + high) / 2:+.1f} points ({low:+.1f} to {high:+.1f})"


def test_a_task_as_people_read_it():
    task = task_score("own", RESULT)
    assert task_row(task) == (
        "own", "acc", "1,200", "50.0 %", "37.5 %", "-12.5 points (-15.0 to -10.0)", "worse"
    )  # fmt: skip
    assert task_text(task) == ("own: 37.5 % (dense 50.0 %), -12.5 points (-15.0 to -10.0), 1,200 questions, measured")
    alone = task_score("own", RESULT | {"dense": None, "difference": None})
    assert task_row(alone) == ("own", "acc", "1,200", "–", "37.5 % (35.0 to 40.0 %)", "–", "")


def test_a_model_that_a_task_calls_broken_is_told_by_its_score():
    report = with_task(metric="task:own", grade="broken")
    assert is_broken(report)
    assert broken_text(report) == f"Broken: {task_text(report.quality.tasks[0])}. Do not deploy this model."
    assert "of no use by task:own: perplexity" in cost_text(report)
    assert "falls by less than 2 points" in rule_of(report.quality.metric)


def test_a_model_that_agreement_calls_broken_is_told_by_it():
    report = with_task(metric="agreement", grade="broken")
    assert "likeliest next token is the dense model's at" in broken_text(report)
