"""fit by the Python interface, on a Jetson's estimates: a bundle within the budget, or one that needs no pruning."""

from __future__ import annotations

import pytest

from edgeprune.commands.fit import fit
from edgeprune.commands.load_bundle import load_bundle
from edgeprune.errors import InputError
from tests.support.runs import home, options, short_durations


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return home(tmp_path_factory)


def test_a_bundle_is_within_the_budget_and_the_work_is_gone(small, tmp_path):
    stages = []
    with short_durations():
        result = fit(**options(small, tmp_path / "out"), progress=lambda stage, *steps: stages.append(stage))
    assert result.met
    row, quality = result.report.budget
    assert (quality.name, quality.limit) == ("quality", 30.0)
    assert row.fitted.value <= row.limit < row.dense.value
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert load_bundle(result.bundle).report == result.report
    assert {"prune and compensate", "cross-check on this machine"} <= set(stages)
    with pytest.raises(InputError, match="is not empty"):
        fit(**options(small, tmp_path / "out"))


def test_a_model_that_fits_as_it_is_is_not_pruned(small, tmp_path):
    report = fit(**options(small, tmp_path / "out", memory="1GiB")).report
    assert report.search.ending == "dense"
    assert (report.ratio, report.modules, report.cross_check) == (0, [], None)
    assert report.fitted.widths == report.dense.widths
    assert "as it is: nothing was pruned" in report.headline
