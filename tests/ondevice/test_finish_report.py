"""A rung's report with the device's figures: rows, rates and room anew, the headline of each verdict, the banner."""

from __future__ import annotations

import json

import pytest

from edgeprune.ondevice.budget import Budget, Limit, judge
from edgeprune.ondevice.figures import Measured, Memory, Performance, performance_to_json
from edgeprune.ondevice.finish_report import NOT_MEASURED, MeasuredRung, banner, merged
from edgeprune.report.schema import Report
from tests.support.pages import ATTACK, Parsed
from tests.support.sample_pictures import pictures_content
from tests.support.sample_reports import MEASUREMENT, estimated_content, measured_content, report_of


def measured(value: float, unit: str = "ms") -> Measured:
    return Measured(value, unit, "a board", 0.9 * value, 1.2 * value)


PERFORMANCE = Performance(
    Memory(*(measured(value, "bytes") for value in (2e8, 6e7, 3e7, 1e5, 4e8))),
    measured(7.0),
    measured(4.0),
    notes=("clocks were not locked",),
)


def rung(**limits: float) -> MeasuredRung:
    budget = Budget(**{name: Limit(value, False, f"{value:g}") for name, value in limits.items()})
    verdict = judge(budget, PERFORMANCE, PERFORMANCE)
    return MeasuredRung(0, verdict.status, PERFORMANCE, verdict)


def document(content: dict, **changes: object) -> dict:
    return json.loads(report_of(content | changes).model_dump_json())


def test_the_figures_are_the_devices_and_all_else_is_the_rungs():
    old = document(estimated_content())
    assert NOT_MEASURED in old["warnings"]
    new = merged(old, MEASUREMENT | {"performance": performance_to_json(PERFORMANCE)}, rung(memory=1e9))
    report = Report.model_validate(new)
    assert (report.status, report.rests_on, report.measurement.machine) == ("met", "measured", "a board")
    (row,) = report.budget
    assert (row.fitted.value, row.limit, row.status) == (PERFORMANCE.memory.total, 1e9, "met")
    assert row.headroom_percent == pytest.approx(100 * (1 - PERFORMANCE.memory.total / 1e9))
    assert (row.dense, row.asked) == (report_of(estimated_content()).budget[0].dense, "90%")
    performance = report.fitted.performance
    assert performance.decode.value == 4.0
    assert performance.decode_ratio is None
    assert report.dense == report_of(estimated_content()).dense
    assert NOT_MEASURED not in report.warnings
    assert report.warnings[-1] == "clocks were not locked"
    assert old == document(estimated_content())  # what was read is not changed


def test_a_rates_interval_is_turned_and_of_the_whole_batch():
    old = document(estimated_content(), workload={"batch": 3, "prompt": 512, "context": 2048})
    rate = merged(old, MEASUREMENT, rung())["tokens_per_second"]["fitted"]
    assert (rate["value"], rate["unit"], rate["source"]) == (750.0, "tokens/s", "measured")
    assert (rate["low"], rate["high"]) == pytest.approx((3000 / 4.8, 3000 / 3.6))


@pytest.mark.parametrize("content", [measured_content, pictures_content])
def test_what_a_user_notices_follows_from_the_devices_figures(content):
    old = document(content())
    noticed = Report.model_validate(merged(old, MEASUREMENT, rung(decode=5.0))).experience["fitted"]
    assert noticed.first_token.value == 7.0
    assert noticed.tokens_per_second.value == 250
    assert noticed.room.model_dump() == old["experience"]["fitted"]["room"]
    assert (noticed.reading_speed is None) == (noticed.seconds_per_image is not None) == (content is pictures_content)


def test_the_row_of_the_quality_stays():
    old = document(measured_content())
    rows = {row["name"]: row for row in merged(old, MEASUREMENT, rung(decode=2.0, memory=1e9))["budget"]}
    before = {row["name"]: row for row in old["budget"]}
    assert rows["quality"] == before["quality"]
    assert (rows["decode"]["status"], rows["memory"]["status"]) == ("missed", "met")
    assert list(rows) == list(before)


@pytest.mark.parametrize(
    ("limit", "quality", "label", "headline"),
    [
        (5.0, "met", "perplexity", "Yes, measured there: M meets decode 5 on a board, at +11.4 % perplexity."),
        (5.0, "met", "agreement with the dense model", "at +11.4 % perplexity on its own text."),
        (
            5.0,
            "missed",
            "perplexity",
            "No: M meets decode 5 on a board, measured there, but only beyond the quality limit: at",
        ),
        (
            5.0,
            "noisy",
            "perplexity",
            "Not clear: M meets decode 5 on a board, its quality is too uncertain to tell (at",
        ),
        (4.2, "met", "perplexity", "Not clear: M, decode 4.2 on a board: too noisy to tell"),
        (3.0, "met", "perplexity", "No, measured there: M does not meet decode 3 on a board, at +11.4 % perplexity."),
    ],
)
def test_the_headline_tells_the_verdict_and_the_cost(limit, quality, label, headline):
    content = estimated_content()
    content["quality"]["label"] = label
    content["model"]["name"] = "M"
    old = document(content, quality_status=quality)
    assert headline in merged(old, MEASUREMENT, rung(decode=limit))["headline"]


def test_a_broken_models_rise_is_a_text_in_the_document():
    content = estimated_content()
    content["quality"]["rise_percent"] = float("inf")
    assert "at more than 100-fold perplexity" in merged(document(content), MEASUREMENT, rung())["headline"]


def test_the_banner_has_a_row_for_each_limit_of_the_device_and_no_markup_of_others():
    old = document(measured_content())
    measurement = MEASUREMENT | {"machine": ATTACK, "version": ATTACK}
    report = merged(old, measurement, rung(decode=2.0, memory=1e9))
    page = Parsed(f"<body>{banner(report, measurement)}</body>")
    assert [tag for tag, _ in page.elements].count("tr") == 3
    assert not page.scripts
    assert not [tag for tag, _ in page.elements if tag == "img"]
    text = " ".join(page.texts)
    assert "decode missed 4.00 ms measured 2.00 ms" in text
    assert "memory met 658.1 MiB measured 953.7 MiB" in text
    assert "quality" not in text.split("constraint")[1]
