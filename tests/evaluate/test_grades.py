import math

import pytest

from edgeprune.errors import InputError
from edgeprune.evaluate.grades import check_metric, grade_of, losses, rule_of, scale_of, worst

TEXTS = {
    "a": {"percent": 3.0, "low": 2.0, "high": 4.0, "agreement": {"share": 0.8, "low": 0.7, "high": 0.85}},
    "b": {"percent": 9.0, "low": -1.0, "high": 20.0, "agreement": {"share": 0.95, "low": 0.9, "high": 0.97}},
}
TASKS = {"own": {"difference": {"value": -0.04, "low": -0.1, "high": 0.02}}}


@pytest.mark.parametrize(
    ("metric", "name", "value", "low", "high", "grade"),
    [
        ("perplexity", "b", 9.0, -1.0, 20.0, "degraded"),
        ("agreement", "a", 20.0, 15.0, 30.0, "degraded"),
        ("task:own", "own", 4.0, -2.0, 10.0, "degraded"),
    ],
)
def test_the_worst_loss_by_each_metric(metric, name, value, low, high, grade):
    found = worst(losses(metric, TEXTS, TASKS))
    assert found.name == name
    assert (found.value, found.low, found.high) == pytest.approx((value, low, high))
    assert grade_of(found.value, metric) == grade


@pytest.mark.parametrize("metric", ["perplexity", "agreement", "task:own"])
def test_grades_change_at_the_thresholds_that_the_rule_names(metric):
    scale = scale_of(metric)
    for edge, below, above in ((scale.degraded, "intact", "degraded"), (scale.broken, "degraded", "broken")):
        assert (grade_of(math.nextafter(edge, 0), metric), grade_of(edge, metric)) == (below, above)
        assert f"{edge:g} {scale.unit}" in rule_of(metric)
    assert grade_of(math.nan, metric) == "broken"


def test_a_text_without_a_place_to_compare_is_worst_by_agreement():
    found = worst(losses("agreement", TEXTS | {"c": TEXTS["a"] | {"agreement": None}}, None))
    assert found.name == "c" and grade_of(found.value, "agreement") == "broken"


def test_a_metric_must_exist():
    for metric in ("perplexity", "agreement", "task:own"):
        check_metric(metric, ["own"])
    for metric in ("task:other", "task:", "accuracy", ""):
        with pytest.raises(InputError):
            check_metric(metric, ["own"])
