"""A bundle's documents read back, and its page written again from them."""

from __future__ import annotations

import json

import pytest

from edgeprune.bundle.read import check_reports, read_frontier, read_report, render_again
from edgeprune.errors import InputError
from edgeprune.ondevice.bundle import open_bundle, sha256
from edgeprune.report.frontier import frontier_of
from edgeprune.report.frontier_page import render_frontier
from edgeprune.report.html import render_html
from tests.support.sample_ladders import ladder
from tests.support.sample_reports import measured_content, report_of
from tests.support.small_bundles import write_ladder, write_report


@pytest.mark.slow
def test_the_page_of_a_report_is_written_again_and_hashed_again(tmp_path):
    report = report_of(measured_content())
    bundle = write_report(tmp_path / "fitted", report)
    assert read_report(bundle) == report
    assert render_again(bundle) == bundle / "report.html"
    assert (bundle / "report.html").read_text() == render_html(report)
    hashes = open_bundle(bundle)["sha256"]
    assert {name: sha256(bundle / name) for name in hashes} == hashes


def test_the_page_of_a_ladder_names_the_folder_that_it_is_in_now(tmp_path):
    frontier = frontier_of(ladder(measured_content))
    bundle = write_ladder(tmp_path / "old", ladder(measured_content)).rename(tmp_path / "a new name")
    assert read_frontier(bundle) == frontier
    assert render_again(bundle) == bundle / "frontier.html"
    page = (bundle / "frontier.html").read_text()
    assert page == render_frontier(frontier, "a new name")
    assert open_bundle(bundle)["sha256"]["frontier.html"] == sha256(bundle / "frontier.html")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file"),
        ("{", "is not JSON"),
        ("{}", "is required|field required"),
        ('{"invented": 1}', "cannot be read by this version of edgeprune"),
        ("[" * 10**5, "nested too deeply"),
        ('{"stages": {"dense performance": NaN}}', "is not JSON: a number is NaN"),
        ('{"invented": -Infinity}', "is not JSON: a number is -Infinity"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "is a pointer of Git LFS"),
        ("\udcff", "is not UTF-8"),
    ],
)
@pytest.mark.parametrize(("read", "name"), [(read_report, "report.json"), (read_frontier, "frontier.json")])
def test_a_document_that_is_none_is_refused_with_the_version_to_use(tmp_path, read, name, content, reason):
    if content is not None:
        (tmp_path / name).write_text(content, errors="surrogateescape")
    with pytest.raises(InputError, match=reason) as caught:
        read(tmp_path)
    assert name in caught.value.message
    assert "git lfs pull" in caught.value.remedy or "the version of edgeprune that manifest" in caught.value.remedy


@pytest.mark.parametrize("place", [("performance", "memory"), ("latency_shares",), ("widths", 0)])
def test_a_report_that_lacks_a_part_of_a_bar_is_refused(tmp_path, place):
    document = json.loads(report_of(measured_content()).model_dump_json())
    parts = document["fitted"]
    for name in place:
        parts = parts[name]
    del parts[next(iter(parts))]
    (tmp_path / "report.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match=f"{place[-1]}: value error, must hold"):
        read_report(tmp_path)


def test_the_reports_of_all_rungs_are_checked(tmp_path):
    bundle = write_report(tmp_path / "fitted", report_of(measured_content()))
    text = (bundle / "report.json").read_text()
    (bundle / "rungs" / "0" / "report.json").write_text(text)
    check_reports(bundle)
    (bundle / "rungs" / "0" / "report.json").write_text(text.replace('"seed"', '"sead"'))
    with pytest.raises(InputError, match=r"rungs/0/report.json cannot be read .*: (seed|sead): "):
        check_reports(bundle)


def test_a_folder_that_is_no_bundle_is_left_alone(tmp_path):
    (tmp_path / "report.json").write_text(report_of(measured_content()).model_dump_json())
    with pytest.raises(InputError, match="is not a bundle"):
        render_again(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
