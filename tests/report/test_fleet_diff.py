"""The differences of two fleets: verdicts and figures by cell, and guards that name the cell."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from edgeprune.errors import InputError
from edgeprune.report.diff import Made
from edgeprune.report.fleet import Row, row_of
from edgeprune.report.fleet_diff import FleetDiff, MadeCell, fleet_diff, print_fleet_diff
from edgeprune.report.schema import Report
from tests.report.test_diff import MANIFEST, slower, worse
from tests.support.sample_reports import estimated_content, measured_content, report_of

NAMES = ("may", "june")


def cell(report: Report, model: str = "a") -> MadeCell:
    row = row_of(report, model=model, target="orin", exit_code=0, bundle=f"{model}/orin", seconds=1.0, node="n")
    return MadeCell(row, Made(model, report, MANIFEST, {}))


def gone(model: str = "a") -> MadeCell:
    return MadeCell(Row(model=model, target="orin", exit_code=4, reason="no GPU"), None)


def printed(report: FleetDiff) -> str:
    console = Console(file=io.StringIO(), width=160)
    print_fleet_diff(report, console)
    return console.file.getvalue()


def test_a_fleet_does_not_differ_from_itself():
    cells = [cell(report_of(measured_content())), gone("b")]
    report = fleet_diff(NAMES, cells, cells, {})
    assert [(one.first, one.second) for one in report.cells] == [("met", "met"), ("failed", "failed")]
    assert not report.failed
    assert printed(report).count("=") == 4  # three figures and the perplexity


def test_what_changed_stands_in_the_row_of_its_cell():
    old = report_of(measured_content())
    report = fleet_diff(NAMES, [cell(old), cell(old, "b")], [cell(worse(slower(old, 1.25), 1.1)), gone("b")], {})
    text = printed(report)
    assert "+25.0 %" in text and "+10.0 %" in text
    assert [(one.model, one.first, one.second) for one in report.cells] == [("a", "met", "met"), ("b", "met", "failed")]
    assert "met, now failed" in text
    assert FleetDiff.model_validate_json(report.model_dump_json()) == report


def test_a_guard_fails_for_each_cell_that_is_worse_and_for_one_without_a_bundle():
    old = report_of(measured_content())
    cells = [cell(old, name) for name in "abc"]
    later = [cell(slower(old, 1.2), "a"), cell(slower(old, 1.02), "b"), gone("c")]
    report = fleet_diff(NAMES, cells, later, {"latency": 5})
    assert [words.partition(":")[0] for words in report.failed] == ["a on orin", "c on orin"]
    assert "june has no bundle" in report.failed[1]
    assert not fleet_diff(NAMES, cells, cells, {"latency": 0}).failed
    assert not fleet_diff(NAMES, [gone()], [gone()], {"latency": 0}).failed


def test_a_cell_that_cannot_be_guarded_is_named():
    with pytest.raises(InputError, match="a on orin: .*cannot be guarded"):
        fleet_diff(NAMES, [cell(report_of(measured_content()))], [cell(report_of(estimated_content()))], {"latency": 5})
