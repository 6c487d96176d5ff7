"""measure by the Python interface: the device's figures in the report and on its page; the device is a double."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from edgeprune.bundle.write import write_fitted
from edgeprune.commands.load_bundle import load_bundle
from edgeprune.commands.measure import measure
from edgeprune.errors import EngineError, InputError
from edgeprune.ondevice.bundle import open_bundle, sha256
from tests.support.bundles import contents
from tests.support.doubles.double_rungs import LARGE, Double
from tests.support.runs import finished, journal_of


@pytest.fixture
def bundle(tmp_path_factory, tmp_path, monkeypatch) -> Path:
    """Of a Jetson, whose budget of memory is that of the run."""
    monkeypatch.setattr("plotly.offline.get_plotlyjs", lambda: "/* plotly.js */")
    fitted = finished(tmp_path_factory).fitted
    write_fitted(
        [replace(fitted, setup=replace(fitted.setup, output=tmp_path / "out"))],
        journal_of(tmp_path / "work"),
        "edgeprune fit",
    )
    return tmp_path / "out"


@pytest.mark.parametrize(("figures", "met"), [({"peak": 10**5}, True), (LARGE, False)])
def test_the_report_and_its_page_have_the_devices_figures(bundle, monkeypatch, figures, met):
    assert load_bundle(bundle).report.rests_on == "estimated"
    device, told = Double({0: figures}, gpu=True), []
    monkeypatch.setattr("edgeprune.commands.measure.LocalSession", lambda: device)
    result = measure(str(bundle), progress=lambda stage, *steps: told.append(stage))
    assert (result.bundle, result.met) == (bundle, met)
    assert [task for _, task in device.asked] == ["build", "check", "measure"]
    report = result.report
    assert (report.measurement.where, report.measurement.machine) == ("this machine", "a board")
    assert report.fitted.performance.decode.source == "measured"
    assert report.measurement.rungs[0].figures["memory"] == report.fitted.performance.memory_total.value
    assert report == load_bundle(bundle).report
    assert (bundle / "engine" / "model.sm87.engine").read_bytes() == b"engine 0"
    assert report.headline.replace("'", "&#39;") in (bundle / "report.html").read_text()
    hashes = open_bundle(bundle)["sha256"]
    assert {name: sha256(bundle / name) for name in hashes} == hashes


def test_what_fails_changes_nothing(bundle, monkeypatch):
    before = contents(bundle)
    failing = Double({0: EngineError("no memory", "smaller")}, gpu=True)
    monkeypatch.setattr("edgeprune.commands.measure.LocalSession", lambda: failing)
    with pytest.raises(EngineError, match="no memory"):
        measure(bundle)
    with pytest.raises(InputError, match="malformed target"):
        measure(bundle, target="board")
    with pytest.raises(InputError, match="--target"):
        measure(bundle, keep_remote=True)
    assert contents(bundle) == before
    (bundle / "manifest.json").write_text(json.dumps([]))
    with pytest.raises(InputError):
        measure(bundle)
