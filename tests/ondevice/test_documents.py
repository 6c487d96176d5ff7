"""The reports of a bundle as the device reads them, without their schema: what no measurement can be merged into."""

from __future__ import annotations

import json

import pytest

from edgeprune.errors import InputError
from edgeprune.ondevice.documents import check_documents
from tests.support.sample_reports import measured_content, report_of
from tests.support.small_bundles import write_report

PLAN = {"rungs": [{}]}


@pytest.fixture
def bundle(tmp_path):
    report = report_of(measured_content())
    folder = write_report(tmp_path / "bundle", report)
    (folder / "rungs" / "0" / "report.json").write_text(report.model_dump_json())
    return folder


def test_a_whole_report_is_taken(bundle):
    check_documents(bundle, PLAN)
    with pytest.raises(InputError, match="knows 2 rungs, the bundle holds 1"):
        check_documents(bundle, {"rungs": [{}, {}]})


@pytest.mark.parametrize(
    ("way", "value", "reason"),
    [
        (("quality", "rise_percent"), "little", "quality.rise_percent is not a number"),
        (("quality", "rise_percent"), None, "rise_percent is not a finite number or a text"),
        (("experience", "fitted", "room", "context_bytes"), -1, "experience.fitted.room has bytes below 0"),
        (("experience", "fitted", "room", "sequence_bytes"), -0.5, "experience.fitted.room has bytes below 0"),
        (("workload", "batch"), "1", "batch is not a whole number"),
    ],
)
def test_a_report_that_no_measurement_can_be_merged_into(bundle, way, value, reason):
    path = bundle / "rungs" / "0" / "report.json"
    report = json.loads(path.read_text())
    part = report
    for key in way[:-1]:
        part = part[key]
    part[way[-1]] = value
    path.write_text(json.dumps(report))
    with pytest.raises(InputError, match=reason) as error:
        check_documents(bundle, PLAN)
    assert str(path) in error.value.message
    assert error.value.remedy
