"""A bundle that was written before: its document by its kind, or what is wrong with the folder."""

from __future__ import annotations

import pytest

from edgeprune.commands.load_bundle import load_bundle
from edgeprune.errors import InputError
from edgeprune.report.frontier import frontier_of
from tests.support.sample_ladders import ladder
from tests.support.sample_reports import broken_content, measured_content, report_of
from tests.support.small_bundles import write_ladder, write_report


@pytest.mark.parametrize(("content", "met"), [(measured_content, True), (broken_content, False)])
def test_a_fitted_bundle_has_its_report(tmp_path, content, met):
    bundle = write_report(tmp_path / "fitted", report_of(content()))
    result = load_bundle(str(bundle))
    assert (result.bundle, result.report, result.met) == (bundle, report_of(content()), met)


def test_a_ladder_has_its_frontier(tmp_path):
    bundle = write_ladder(tmp_path / "ladder", ladder(measured_content))
    result = load_bundle(bundle)
    assert result.report == frontier_of(ladder(measured_content))
    assert result.met


def test_a_folder_that_is_none_or_misses_a_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="is not a bundle"):
        load_bundle(tmp_path)
    bundle = write_report(tmp_path / "fitted", report_of(measured_content()))
    (bundle / "report.html").unlink()
    with pytest.raises(InputError, match="is missing 1 of its files"):
        load_bundle(bundle)
