"""An evaluation's results as they stand in the report, and their grades."""

from __future__ import annotations

import pytest

from edgeprune.evaluate.grades import grade_of
from edgeprune.report.quality import quality_part


def test_an_evaluation_as_it_stands_in_the_report():
    share = {"share": 0.75, "low": 0.5, "high": 0.875, "places": 8, "documents": 2, "of": 3}
    shown = {"percent": 75.0, "low_percent": 50.0, "high_percent": 87.5, "places": 8, "documents": 2, "of": 3}
    losses = {"dense": 10.0, "fitted": 11.0, "percent": 10.0, "low": 8.0, "high": 12.0, "documents": 5, "tokens": 9}
    samples = {"prompt": "p", "dense_sample": "d", "fitted_sample": "f"}
    step = {"tokens": 4, "same": 3, "answers": 4, "low": 0.3, "high": 0.95}
    found = quality_part(
        "perplexity",
        {"a": {**losses, "agreement": share}, "b": {**losses, "percent": 2.0, "agreement": None}},
        {"device": "cpu, fp32", "prompt_tokens": 32, "identical": [step]},
        **samples,
    )
    assert found.texts[0].agreement.model_dump() == shown
    assert found.texts[1].agreement is None
    assert (found.rise_percent, found.grade, found.prompt) == (10.0, "degraded", "p")
    (first,) = found.answers.identical
    assert (first.percent, first.low_percent, first.high_percent) == (75.0, 30.0, 95.0)
    assert quality_part("perplexity", {"a": {**losses, "agreement": None}}, None, **samples).answers is None


@pytest.mark.parametrize(
    ("rise", "grade"),
    [(-3.0, "intact"), (4.99, "intact"), (5.0, "degraded"), (29.99, "degraded"), (30.0, "broken"), (900.0, "broken")],
)
def test_grades_at_their_thresholds(rise, grade):
    assert grade_of(rise) == grade
