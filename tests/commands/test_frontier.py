"""frontier by the Python interface, on a Jetson's estimates: a ladder down from the dense model."""

from __future__ import annotations

import pytest

from edgeprune.commands.frontier import frontier
from edgeprune.commands.load_bundle import load_bundle
from edgeprune.errors import InputError
from tests.support.runs import home, options


@pytest.mark.slow
def test_no_rung_is_slower_than_the_last_and_each_is_within_its_share(tmp_path_factory, tmp_path):
    given = options(home(tmp_path_factory), tmp_path / "out", memory=None)
    result = frontier(**given, rungs=2)
    times = [result.report.dense.decode.value, *(rung.decode.value for rung in result.report.rungs)]
    assert times == sorted(times, reverse=True)
    assert len(times) == 3
    assert times[-1] < times[0]
    for rung in result.report.rungs:
        share = float(rung.asked.removeprefix("decode ").removesuffix("%")) / 100
        assert rung.status == "met"
        assert rung.decode.value <= share * times[0] * 1.001
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert load_bundle(tmp_path / "out").report == result.report
    assert result.met
    again = frontier(**given, rungs=2, resume=True)  # it is complete already
    assert again.report == result.report
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_the_dense_model_is_no_rung_even_where_every_cut_costs_too_much(tmp_path_factory, tmp_path, monkeypatch):
    """The shares of such a ladder are all 1, which the dense model itself meets."""
    monkeypatch.setattr("edgeprune.commands.frontier.WORST_FRONTIER_NATS", -1.0)
    given = options(home(tmp_path_factory), tmp_path / "out", memory=None)
    report = frontier(**given, rungs=2).report
    assert report.rungs
    assert all(rung.decode.value < report.dense.decode.value for rung in report.rungs)
    assert all(rung.decode_bytes_ratio > 0 for rung in report.rungs)


def test_a_ladder_of_too_many_rungs_is_refused(tmp_path_factory, tmp_path):
    with pytest.raises(InputError, match="--rungs 9 is not 1 to 8"):
        frontier(**options(home(tmp_path_factory), tmp_path / "out", memory=None), rungs=9)
