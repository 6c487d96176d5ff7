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
    monkeypatch.setattr("edgeprune.commands.measure.ThisMachine", lambda: device)
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
    monkeypatch.setattr("edgeprune.commands.measure.ThisMachine", lambda: failing)
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


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("report.json", {"experience": None}, "report.json cannot be read .*: experience: "),
        ("rungs/0/report.json", {"invented": 1}, "rungs/0/report.json cannot be read .*: invented: "),
        ("deployment.json", {"rungs": []}, "deployment.json: rungs is not one of this version"),
        ("deployment.json", {"graph": "../model.onnx"}, "deployment.json: graph is not one of this version"),
        ("deployment.json", {"sm": "87"}, "deployment.json: sm is not a whole number or null"),
        ("deployment.json", {"limits": {"memory": {"value": -1, "asked": "-1"}}}, "deployment.json: limits is not one"),
        ("deployment.json", {"limits": {"memory": 3}}, "deployment.json: limits.memory: it is not an object"),
        ("deployment.json", {"later": 1}, "deployment.json: later is not known to this version"),
    ],
)
def test_documents_are_checked_before_any_work(bundle, monkeypatch, name, change, reason):
    path = bundle / name
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    device = Double({0: LARGE}, gpu=True)
    monkeypatch.setattr("edgeprune.commands.measure.ThisMachine", lambda: device)
    before = contents(bundle)
    with pytest.raises(InputError, match=reason):
        measure(bundle)
    assert device.asked == []
    assert contents(bundle) == before


def test_a_graph_that_is_not_the_manifests_is_never_built(bundle, monkeypatch):
    for path in (bundle / "rungs" / "0" / "onnx").iterdir():
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    device = Double({0: LARGE}, gpu=True)
    monkeypatch.setattr("edgeprune.commands.measure.ThisMachine", lambda: device)
    with pytest.raises(InputError, match="is a pointer of Git LFS"):
        measure(bundle)
    assert device.asked == []
