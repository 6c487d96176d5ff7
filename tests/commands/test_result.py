"""Whether what a command returned is met: of a report, a list of plans, or rows that were asked for nothing."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from edgeprune.commands.result import Result
from tests.support.sample_reports import broken_content, measured_content, report_of


@pytest.mark.parametrize(
    ("changes", "met"), [({}, True), ({"status": "noisy"}, False), ({"quality_status": "missed"}, False)]
)
def test_a_report_is_met_where_budget_and_quality_are(changes, met):
    assert Result(None, report_of(measured_content() | changes)).met == met
    assert not Result(None, report_of(broken_content())).met


def test_plans_are_met_where_all_of_them_fit():
    fits, does_not = SimpleNamespace(fits=True), SimpleNamespace(fits=False)
    assert Result(None, [fits, fits]).met
    assert not Result(None, [fits, does_not]).met
    assert Result(None, [object()]).met
