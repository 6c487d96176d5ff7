"""measure by the Python interface: the device's figures in the report and on its page; the device is a double."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from edgeprune.bundle.write import write_fitted
from edgeprune.commands.load_bundle import load_bundle
from edgeprune.commands.measure import measure
from edgeprune.errors import BadAnswer, EngineError, InputError
from edgeprune.ondevice.bundle import open_bundle, sha256
from edgeprune.report.verdict import verdict
from tests.support.bundles import contents
from tests.support.commands import run
from tests.support.doubles.double_rungs import LARGE, Double
from tests.support.doubles.liar import MAKES
from tests.support.lying_device import JETSON, TIMED, LyingBoard, faults, lying_plan, shorten
from tests.support.runs import finished, journal_of


@pytest.fixture
def bundle(tmp_path_factory, tmp_path) -> Path:
    """Of a Jetson, whose budget of memory is that of the run."""
    fitted = finished(tmp_path_factory).fitted
    write_fitted(
        [replace(fitted, setup=replace(fitted.setup, output=tmp_path / "out"))],
        journal_of(tmp_path / "work"),
        "edgeprune fit",
    )
    return tmp_path / "out"


@pytest.mark.slow
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
    assert f"<h1>{verdict(report)}</h1>" in (bundle / "report.html").read_text()
    assert ("fits into" in verdict(report)) == met
    assert "on a board" in verdict(report)
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("report.json", {"experience": None}, "report.json cannot be read .*: experience: "),
        ("rungs/0/report.json", {"invented": 1}, "rungs/0/report.json cannot be read .*: invented: "),
        ("deployment.json", {"rungs": []}, "deployment.json: rungs is not one of this version"),
        ("deployment.json", {"older_graph": "../model.onnx"}, "deployment.json: graph is not one of this version"),
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
        path.unlink()  # it is a hard link to the run's own file, which other tests share
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    device = Double({0: LARGE}, gpu=True)
    monkeypatch.setattr("edgeprune.commands.measure.ThisMachine", lambda: device)
    with pytest.raises(InputError, match="is a pointer of Git LFS"):
        measure(bundle)
    assert device.asked == []


@pytest.fixture
def board(tmp_path, monkeypatch) -> LyingBoard:
    shorten(monkeypatch)
    return LyingBoard(tmp_path / "board")


def measured_there(bundle: Path, board: LyingBoard, **plan: object) -> subprocess.CompletedProcess:
    """The command line on the device; whatever it did, it was one of the ends that are allowed."""
    before = contents(bundle)
    board.follow({"answers": JETSON, "lies": {}, **plan})
    result = run("measure", bundle, "--target", board.target, path=board.path)
    assert faults(bundle, before, result) == []
    return result


def test_a_device_that_tells_the_truth_is_measured(bundle, board):
    assert measured_there(bundle, board).returncode == 0
    assert load_bundle(bundle).report.fitted.performance.decode.value == 2.0
    assert (bundle / "engine" / "model.sm87.engine").read_bytes() == MAKES


def interval(value: float) -> dict[str, float]:
    return {"value": value, "low": value, "high": value}


@pytest.mark.slow
@pytest.mark.parametrize("value", [-5, 0, 5e-324, float("nan"), float("inf"), "2", None])
def test_a_latency_that_cannot_be_is_a_failed_measurement(bundle, board, value):
    lie = JETSON["measure"] | {"decode": {"candidate": TIMED | {"median": interval(value)}}}
    result = measured_there(bundle, board, answers=JETSON | {"measure": lie})
    assert result.returncode == 4
    assert "answers what cannot be: decode.candidate.median.value" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("message", "lie", "words"),
    [
        ("answer to describe", {"line": "", "then": "stop"}, "gave no sign of life for 1 s"),
        ("answer to measure", {"line": "", "then": '{"alive": true}\n'}, "did not answer within 2 s"),
        ("missing", {"line": "", "then": "silence"}, "gave no sign of life for 1 s"),
        ("go", {"line": "x" * 2_000_000}, "sends a line without an end"),
        ("size", {"line": f'{{"size": {1 << 49}}}\n'}, "MiB free"),
        ("bytes", {"line": "an ENGINE"}, "arrived damaged"),
        ("bytes", {"line": "an", "then": "close"}, "was lost"),
        ("left", {"line": "", "then": "y\n"}, "is no message"),
    ],
)
def test_a_lie_in_the_conversation_ends_it_and_leaves_nothing(bundle, board, message, lie, words):
    result = measured_there(bundle, board, lies={message: lie})
    assert result.returncode == 4
    assert words in result.stderr


@pytest.mark.slow
def test_no_lie_becomes_a_figure_or_a_crash(bundle, board, tmp_path):
    for seed in range(40):
        shutil.copytree(bundle, copy := tmp_path / f"copy-{seed}", symlinks=True)
        name, plan = lying_plan(seed)
        try:
            measured_there(copy, board, **plan)
        except AssertionError as error:
            raise AssertionError(f"{seed}: {name}") from error


def test_what_does_not_make_a_report_replaces_nothing(bundle, monkeypatch):
    """Figures that pass for themselves, and together are none: what a report holds is their sum."""
    before = contents(bundle)
    monkeypatch.setattr("edgeprune.ondevice.finish.merged", lambda report, *_: report | {"status": "splendid"})
    monkeypatch.setattr("edgeprune.commands.measure.ThisMachine", lambda: Double({0: LARGE}, gpu=True))
    with pytest.raises(EngineError, match="would not be valid: .*status"):
        measure(bundle)
    monkeypatch.setattr("edgeprune.ondevice.finish.merged", lambda report, *_: report | {"ratio": float("inf")})
    with pytest.raises(EngineError, match="would not be valid: a figure is not finite"):
        measure(bundle)
    assert contents(bundle) == before


def test_a_device_that_is_not_believed_is_not_asked_for_a_smaller_rung(bundle, monkeypatch):
    device = Double({0: BadAnswer("the clock stands still", "again")}, gpu=True)
    monkeypatch.setattr("edgeprune.commands.measure.ThisMachine", lambda: device)
    with pytest.raises(BadAnswer):
        measure(bundle)
    assert [task for _, task in device.asked] == ["build"]
