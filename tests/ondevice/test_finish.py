"""finish.pyz in a bare virtual environment; what it decides and writes, with a device that is a double."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from edgeprune.errors import EngineError, InputError, Unreachable, WrongEngine
from edgeprune.ondevice import finish as finishing
from edgeprune.ondevice.bundle import open_bundle, sha256
from edgeprune.ondevice.finish import finish
from edgeprune.ondevice.worker import quiet
from edgeprune.report.schema import Report
from tests.support.bundles import change, contents, copy_of, fitted, rewrite
from tests.support.device import bare_python
from tests.support.doubles.double_rungs import LARGE, SMALL, Double
from tests.support.durations import durations

pytestmark = pytest.mark.slow

GENEROUS, TINY = {"memory": 2.0**40}, {"memory": 1.0}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fitted(tmp_path_factory)


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bare_python(tmp_path_factory.mktemp("venv"))


def pyz(python: Path, bundle: Path, *words: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [python, bundle / "finish.pyz", *words],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd or bundle,
        env={"PATH": "/usr/bin:/bin", "HOME": str(bundle.parent)} | durations(),
    )


def checked(bundle: Path) -> Report:
    """The report, after it was seen that the bundle is whole."""
    hashes = open_bundle(bundle)["sha256"]
    assert {name: sha256(bundle / name) for name in hashes} == hashes
    files = {name for name in contents(bundle) if not (bundle / name).is_symlink()}
    assert files == {*hashes, "manifest.json"}
    report = Report.model_validate_json((bundle / "report.json").read_text())
    assert json.loads((bundle / "measurement.json").read_text()) == report.measurement.model_dump()
    assert report.measurement.rung in range(len(report.measurement.rungs))
    assert report.files["measurement.json"] == (bundle / "measurement.json").stat().st_size
    page = (bundle / "report.html").read_text()
    assert page.count(f"rung {report.measurement.rung}.") >= 1
    assert page.count("<!-- measured -->") == 1
    assert sorted(report.measurement.performance["memory"]) == sorted(report.fitted.performance.memory)
    for row in report.budget:
        if row.name != "quality":
            assert row.fitted.value == report.measurement.rungs[report.measurement.rung].figures[row.name]
    noticed, performance = report.experience["fitted"], report.fitted.performance
    assert noticed.first_token == performance.prefill
    assert noticed.tokens_per_second.value == pytest.approx(1000 / performance.decode.value)
    spare = noticed.room.limit - performance.memory_total.value
    assert (noticed.sequences.value >= report.workload.batch) == (spare >= 0)
    assert (noticed.longest_context.value >= report.workload.context) == (spare >= 0)
    return report


@pytest.mark.slow
def test_on_a_bare_machine_it_takes_the_largest_rung_that_meets_the_budget(
    made: Path, python: Path, tmp_path: Path
) -> None:
    """First none does; then, in the same bundle, with a limit between what was measured of the two."""
    bundle = copy_of(made, tmp_path / "a bundle", TINY)
    result = pyz(python, bundle)
    assert result.returncode == 3, result.stderr
    report = checked(bundle)
    assert (report.status, report.measurement.rung, report.rests_on) == ("missed", 1, "measured")
    assert "does not meet memory" in report.headline
    assert [rung.status for rung in report.measurement.rungs] == ["missed", "missed"]
    assert "rung 0: check the engine's logits" in result.stderr
    large, small = (rung.figures["memory"] for rung in report.measurement.rungs)
    assert small < large
    change(bundle, limits={"memory": {"value": (small + large) / 2, "asked": "something between"}})

    result = pyz(python, bundle, "--json", cwd=tmp_path)
    assert result.returncode == (0 if report.quality_status == "met" else 3), result.stderr
    report = checked(bundle)
    assert json.loads(result.stdout) == report.measurement.model_dump()
    assert [rung.status for rung in report.measurement.rungs] == ["missed", "met"]
    assert (report.status, report.measurement.rung) == ("met", 1)
    assert "meets memory" in report.headline
    assert report.fitted.performance.decode.source == "measured"
    assert report.fitted.performance.conditions["logits against the fp32 graph"]
    for name in ("model", "onnx"):
        assert (bundle / name).readlink() == Path("rungs/1") / name
    assert report.ratio == Report.model_validate_json((bundle / "rungs/1/report.json").read_text()).ratio


def test_a_copy_whose_links_became_folders(made: Path, python: Path, tmp_path: Path) -> None:
    subprocess.run(["cp", "-rL", copy_of(made, tmp_path / "first", GENEROUS), tmp_path / "second"], check=True)
    result = pyz(python, tmp_path / "second")
    assert result.returncode == 0, result.stderr
    assert "met" in result.stdout
    report = Report.model_validate_json((tmp_path / "second" / "report.json").read_text())
    assert (report.status, report.measurement.rung) == ("met", 0)
    assert not [text for text in report.warnings if "became folders" in text]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
def test_an_output_that_is_full_takes_nothing_from_the_measurement(made: Path, python: Path, tmp_path: Path) -> None:
    bundle = copy_of(made, tmp_path / "bundle", GENEROUS)
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [python, bundle / "finish.pyz"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | durations(),
        )
    assert "cannot write standard output: [Errno 28]" in result.stderr
    assert str(bundle / "measurement.json") in result.stderr
    assert "Traceback" not in result.stderr
    assert result.returncode == (0 if checked(bundle).quality_status == "met" else 3)


@pytest.mark.parametrize("packages", [(), ("numpy",)])
def test_a_module_that_is_missing(made: Path, tmp_path: Path, packages: tuple[str, ...]) -> None:
    bundle = copy_of(made, tmp_path / "bundle")
    before = contents(bundle)
    result = pyz(bare_python(tmp_path / "venv", packages), bundle)
    name = "onnxruntime" if packages else "numpy"
    assert result.returncode == 4
    assert f"error: this machine has no Python module {name}\npip install {name}\n" in result.stderr
    assert "Traceback" not in result.stderr
    assert contents(bundle) == before


def test_an_old_python(made: Path, python: Path) -> None:
    code = (
        "import runpy, sys; sys.version_info = (3, 8, 10, 'final', 0); "
        f"runpy.run_path({str(made / 'finish.pyz')!r}, run_name='__main__')"
    )
    result = subprocess.run([python, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (4, "error: this is Python 3.8\nInstall Python 3.10 or newer.\n")


def test_another_model_than_the_reference_s_is_never_timed(made: Path, python: Path, tmp_path: Path) -> None:
    bundle = copy_of(made, tmp_path / "bundle", GENEROUS)
    data = bundle / "rungs/0/onnx/model.onnx.data"
    weights = bytearray(data.read_bytes())
    data.unlink()  # rungs share files
    for place in range(100_003, len(weights) - 4, 4096):
        weights[place] ^= 0x43  # the exponents of some weights
    data.write_bytes(weights)
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["sha256"]["rungs/0/onnx/model.onnx.data"] = sha256(data)
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    before = contents(bundle)
    result = pyz(python, bundle)
    assert result.returncode == 4
    assert "computes something else than its graph" in result.stderr
    assert "Do not deploy it" in result.stderr
    assert "measure" not in result.stderr.replace("measured", "")
    assert contents(bundle) == before


def test_no_bundle(made: Path, python: Path, tmp_path: Path) -> None:
    alone = tmp_path / "finish.pyz"
    shutil.copy(made / "finish.pyz", alone)
    result = pyz(python, tmp_path)
    assert result.returncode == 2
    assert "is not a bundle" in result.stderr
    bundle = copy_of(made, tmp_path / "bundle")
    (bundle / "rungs/1/onnx/embedding.data").unlink()
    result = pyz(python, tmp_path, str(bundle))
    assert result.returncode == 2
    assert "is missing 1 of its files" in result.stderr


def test_killed_in_the_middle_it_leaves_the_bundle_as_it_was(made: Path, python: Path, tmp_path: Path) -> None:
    bundle = copy_of(made, tmp_path / "bundle", GENEROUS)
    before = contents(bundle)
    process = subprocess.Popen(
        [python, bundle / "finish.pyz"],
        stderr=subprocess.PIPE,
        text=True,
        env={"EDGEPRUNE_CACHE": str(tmp_path)} | durations(),
    )
    assert any("measure" in line for line in process.stderr)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert children
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    end = time.monotonic() + 10
    while any(Path(f"/proc/{child}/exe").exists() for child in children) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{child}/exe").exists() for child in children)
    assert contents(bundle) == before


BETWEEN = {"memory": 5e8}


def done(bundle: Path, session: Double) -> Report:
    finish(bundle, session, "a board on the desk", quiet)
    return checked(bundle)


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    return copy_of(made, tmp_path / "bundle", BETWEEN)


def test_a_rung_that_cannot_run_is_passed_over(bundle: Path) -> None:
    report = done(bundle, Double({0: EngineError("ended by SIGKILL", "smaller"), 1: SMALL}))
    assert [rung.status for rung in report.measurement.rungs] == ["failed", "met"]
    assert report.measurement.rungs[0].error == "ended by SIGKILL"
    assert report.measurement.where == "a board on the desk"


def test_a_rung_that_fails_last_does_not_discard_the_others(bundle: Path) -> None:
    report = done(bundle, Double({0: LARGE, 1: EngineError("no memory", "smaller")}))
    assert [rung.status for rung in report.measurement.rungs] == ["missed", "failed"]
    assert (report.status, report.measurement.rung) == ("missed", 0)


@pytest.mark.parametrize(
    ("first", "second", "asked"),
    [
        (EngineError("no memory", "smaller"), EngineError("no memory either", "smaller"), {0, 1}),
        (WrongEngine("something else", "do not"), SMALL, {0}),
        (Unreachable("the connection was lost", "again"), SMALL, {0}),
        (LARGE, WrongEngine("something else", "do not"), {0, 1}),
    ],
)
def test_what_ends_the_whole_measurement_changes_nothing(bundle: Path, first, second, asked: set[int]) -> None:
    """A device that is gone is no reason to take a smaller model."""
    before, device = contents(bundle), Double({0: first, 1: second})
    with pytest.raises(EngineError) as caught:
        finish(bundle, device, "a board", quiet)
    assert caught.value is (second if len(asked) == 2 else first)
    assert {rung for rung, _ in device.asked} == asked
    assert contents(bundle) == before


def test_engines_are_built_beside_and_recorded(bundle: Path, tmp_path: Path) -> None:
    change(bundle, engine="tensorrt", sm=87)
    device = Double({0: LARGE, 1: SMALL}, gpu=True)
    report = done(bundle, device)
    assert [do for _, do in device.asked] == ["build", "check", "measure"] * 2
    assert (report.measurement.rung, report.measurement.gpu, report.status) == (1, "Orin", "met")
    assert (bundle / "engine" / "model.sm87.engine").read_bytes() == b"engine 1"
    assert report.files["rungs/1/engine/model.sm87.engine"] == len(b"engine 1")
    assert report.fitted.performance.memory["weights"].source == "built"
    assert "slow kernels" in report.warnings
    before = contents(bundle)
    with pytest.raises(Unreachable):  # the second measurement has built rung 0 anew when the device goes
        finish(bundle, Double({0: LARGE, 1: Unreachable("gone", "again")}, gpu=True), "a board", quiet)
    assert contents(bundle) == before
    other = Double({}, gpu=True)
    other.gpu = False
    with pytest.raises(EngineError, match="a board has no Python module tensorrt"):
        finish(bundle, other, "a board", quiet)


def test_interrupted_at_any_step_of_writing_it_is_as_before_or_whole(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every move of a file is the last one once; whoever measures next completes what was complete."""
    before, steps, real = contents(bundle), 0, Path.replace
    while True:
        copy = tmp_path / f"copy-{steps}"
        shutil.copytree(bundle, copy, symlinks=True)
        left = steps

        def cut(self: Path, target: Path) -> Path:
            nonlocal left
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            return real(self, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", cut)
            patch.setattr(Path, "rename", cut)
            try:
                finish(copy, Double({0: LARGE, 1: SMALL}), "a board", quiet)
                break
            except KeyboardInterrupt:
                pass
        if steps == 0:  # nothing was complete
            assert contents(copy) == before
        else:
            with pytest.raises(Unreachable):
                finish(copy, Double({0: Unreachable("gone", "again")}), "a board", quiet)
            assert checked(copy).measurement.rung == 1
            assert (copy / "onnx").readlink() == Path("rungs/1/onnx")
        steps += 1
    assert steps > 5
    assert checked(copy).measurement.rung == 1


def test_a_disk_that_fills_while_it_writes(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, real = contents(bundle), Path.write_text

    def write_text(self: Path, text: str, **options: Any) -> int:
        if self.name == "report.html":
            real(self, text[:1000], **options)
            raise OSError(28, "No space left on device")
        return real(self, text, **options)

    monkeypatch.setattr(Path, "write_text", write_text)
    with pytest.raises(EngineError, match="cannot be written: No space left on device"):
        finish(bundle, Double({0: SMALL}), "a board", quiet)
    assert contents(bundle) == before


def test_two_that_measure_the_same_bundle(bundle: Path) -> None:
    class Other(Double):
        def run(self, *arguments: Any) -> dict[str, Any]:
            with pytest.raises(InputError, match="being measured already"):
                finish(bundle, Double({0: SMALL}), "a board", quiet)
            return super().run(*arguments)

    assert done(bundle, Other({0: SMALL})).status == "met"


def test_a_bundle_that_cannot_be_written_is_refused_before_the_work(bundle: Path, monkeypatch) -> None:
    monkeypatch.setattr(os, "access", lambda *arguments: False)
    device = Double({0: SMALL})
    with pytest.raises(InputError, match="cannot write to"):
        finish(bundle, device, "a board", quiet)
    assert device.asked == []


def test_another_rung_than_that_of_the_copied_folders_is_told(made: Path, tmp_path: Path) -> None:
    subprocess.run(["cp", "-rL", copy_of(made, tmp_path / "first", BETWEEN), tmp_path / "second"], check=True)
    finish(tmp_path / "second", Double({0: LARGE, 1: SMALL}), "a board", quiet)
    report = Report.model_validate_json((tmp_path / "second" / "report.json").read_text())
    (warning,) = [text for text in report.warnings if "became folders" in text]
    assert "model, onnx" in warning
    assert "rungs/1" in warning


@pytest.mark.parametrize(
    ("decode", "quality", "words", "code"),
    [
        ((1.0, 0.9, 1.1), "met", "Yes, measured there: model meets decode 2.0 on a board, at", 0),
        ((2.0, 1.9, 2.1), "met", "too noisy to tell: run again on an idle machine", 3),
        ((3.0, 2.9, 3.1), "met", "does not meet decode 2.0", 3),
        ((1.0, 0.9, 1.1), "missed", "only beyond the quality limit", 3),
        ((1.0, 0.9, 1.1), "noisy", "its quality is too uncertain to tell", 3),
    ],
)
def test_the_verdict_in_words_and_as_an_exit_code(
    made: Path, tmp_path: Path, monkeypatch, capsys, decode: tuple[float, ...], quality: str, words: str, code: int
) -> None:
    bundle = copy_of(made, tmp_path / "bundle", {"decode": 2.0})
    for index in (0, 1):
        name = f"rungs/{index}/report.json"
        report = json.loads((bundle / name).read_text())
        report["quality_status"], report["quality"]["rise_percent"] = quality, "Infinity"
        report["budget"][0] |= {"name": "decode", "unit": "ms"}
        for candidate in report["search"]["candidates"]:
            candidate |= {name: {"decode": 2.0} for name in ("predicted", "obtained")}
        rewrite(bundle, name, json.dumps(report).encode())
    figures = SMALL | {"decode": dict(zip(("value", "low", "high"), decode, strict=True))}
    monkeypatch.setattr(finishing, "LocalSession", lambda: Double({0: figures, 1: figures}))
    monkeypatch.setattr("sys.argv", ["finish.pyz", str(bundle)])
    monkeypatch.setattr("sys.path", ["first"])
    assert finishing.main() == code
    report = checked(bundle)
    assert words in report.headline
    assert report.exit_code() == code
    assert "a board, onnxruntime 1.20\nrung 0: " in capsys.readouterr().out
