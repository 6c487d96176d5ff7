"""`fit --target`, `measure --target` and `finish.pyz` with doubles of TensorRT and cuda-python on the far side of a
real sshd: all of the product is real, the GPU is not. No GPU runs in these tests."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgeprune.report.schema import Report
from tests.support import ROOT
from tests.support.bundles import change, contents
from tests.support.checkpoints import save_llama
from tests.support.commands import SMALL, run, run_alone
from tests.support.device import Server, ssh_server
from tests.support.device_doubles import nvidia_smi, path_to, python_with_doubles

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    save_llama(folder / "model", num_hidden_layers=2, intermediate_size=512)
    (folder / "text.txt").write_text(
        "\n\n".join(f"the quick brown fox jumps over {i} lazy dogs" * 9 for i in range(60))
    )
    return folder


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return python_with_doubles(tmp_path_factory.mktemp("python"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, python: Path) -> Iterator[Server]:
    with ssh_server(tmp_path_factory.mktemp("device"), python) as server:
        nvidia_smi(server.folder / "device-bin")
        yield server


@pytest.fixture(scope="module")
def fitted(home: Path, server: Server) -> Path:
    """A tiny model fitted in a relative decode budget: the double's clock counts the engine's bytes."""
    result = run(
        "fit",
        home / "model",
        "--device",
        "jetson-orin",
        "--memory",
        "99%",
        "--calibration",
        home / "text.txt",
        "--output",
        home / "bundle",
        "--target",
        server.target,
        "--rungs",
        "2",
        *SMALL,
        path=path_to(server),
    )
    assert result.returncode == 0, result.stderr
    return home / "bundle"


def test_on_a_double_every_candidate_is_built_checked_and_measured_behind_ssh(fitted: Path, server: Server) -> None:
    report = Report.model_validate_json((fitted / "report.json").read_text())
    for side in (report.dense, report.fitted):
        assert (side.performance.decode.source, side.performance.prefill.source) == ("measured", "measured")
        assert side.performance.memory["weights"].source == "built"
        assert "cosine" in side.performance.conditions["logits against the fp32 graph"]
    assert report.engine.name == "tensorrt"
    assert "cuda-python" in report.engine.reason
    assert report.fitted.performance.memory["weights"].value < report.dense.performance.memory["weights"].value
    assert report.cross_check is None  # the device itself was measured
    assert [path.name for path in (fitted / "engine").iterdir()] == ["model.sm87.engine"]
    assert (fitted / "rungs" / "1" / "engine" / "model.sm87.engine").stat().st_size
    server.wait_until_quiet()
    assert not server.working_folders()


def test_on_a_double_a_bundle_is_measured_again_behind_ssh(fitted: Path, server: Server) -> None:
    before = (fitted / "engine" / "model.sm87.engine").stat().st_mtime_ns
    result = run("measure", fitted, "--target", server.target, "--json", path=path_to(server))
    assert result.returncode == 0, result.stderr
    report = Report.model_validate_json(result.stdout)
    assert (report.measurement.engine, report.measurement.version, report.measurement.rung) == ("tensorrt", "10.3.0", 0)
    assert report.measurement.where == server.target
    assert (fitted / "engine" / "model.sm87.engine").stat().st_mtime_ns != before  # built anew, and fetched
    server.wait_until_quiet()


def test_on_a_double_finish_builds_and_measures_with_nothing_installed(
    fitted: Path, python: Path, tmp_path: Path
) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(fitted, copied, symlinks=True)
    for engine in copied.rglob("*.engine"):
        engine.unlink()
    manifest = copied / "manifest.json"
    manifest.write_text("\n".join(line for line in manifest.read_text().splitlines() if ".engine" not in line))
    result = subprocess.run(
        [python, copied / "finish.pyz"],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=tmp_path,
        env={"PATH": f"{nvidia_smi(tmp_path / 'bin')}:/usr/bin:/bin", "EDGEPRUNE_CACHE": str(tmp_path / "cache")},
    )
    assert result.returncode == 0, result.stderr
    assert "rung 0: met" in result.stdout
    report = Report.model_validate_json((copied / "report.json").read_text())
    assert report.measurement.where == "this machine"
    assert (copied / "engine" / "model.sm87.engine").is_file()


def test_on_a_double_a_build_that_the_memory_does_not_hold_is_refused_before_anything_is_sent(
    home: Path, fitted: Path, python: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """By fit, before its samples are drawn; by measure and finish.pyz, for every rung."""
    text = run("devices", "jetson-orin", "--toml").stdout
    head, mark, tail = text.partition("[build_memory]")
    assert mark
    (tmp_path / "small.toml").write_text(head + mark + re.sub(r"value = \S+", "value = 0.1", tail, count=1))
    measured = tmp_path / "measured"
    shutil.copytree(fitted, measured, symlinks=True)
    change(measured, build_memory=10**8)
    with ssh_server(tmp_path_factory.mktemp("fresh"), python) as fresh:
        words = ("--target", fresh.target)
        profile = ("--profile", tmp_path / "small.toml", "--output", tmp_path / "none")
        result = run("fit", home / "model", *profile, *words, *SMALL, path=path_to(fresh))
        assert result.returncode == 4, result.stderr
        said = f"MiB of memory (estimated, within 15 %), {fresh.target} has 95.4 MiB for it"
        assert said in result.stderr
        assert "add swap" in result.stderr
        before = contents(measured)
        result = run("measure", measured, *words, path=path_to(fresh))
        assert result.returncode == 4, result.stderr
        assert said in result.stderr
        assert contents(measured) == before
        assert not fresh.stored()
    finished = subprocess.run(
        [python, measured / "finish.pyz"],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "EDGEPRUNE_CACHE": str(tmp_path / "cache")},
    )
    assert finished.returncode == 4, finished.stderr
    assert "this machine has 95.4 MiB for it" in finished.stderr


def test_on_a_double_run_generates_from_the_engine(fitted: Path, python: Path) -> None:
    """The same text from the engine, where its modules are, as from the graph on the processor."""
    site = next((python.parents[1] / "lib").glob("python3*")) / "site-packages"
    words = ["run", fitted, "--prompt", "the quick", "--max-new-tokens", "3"]  # of more, near ties decide
    on_processor = run_alone(*words)
    assert on_processor.returncode == 0, on_processor.stderr
    assert "not by the engine" in on_processor.stderr
    only = site.parent / "only-doubles"
    only.mkdir(exist_ok=True)
    for name in ("shared_double.py", "tensorrt.py", "cuda"):
        if not (only / name).exists():
            (only / name).symlink_to(site / name)
    on_engine = run_alone(*words, python_path=f"{only}:{ROOT}")
    assert on_engine.returncode == 0, on_engine.stderr
    assert "not by the engine" not in on_engine.stderr
    assert on_engine.stdout == on_processor.stdout


def test_on_a_double_a_device_of_another_sm_is_refused(
    home: Path, fitted: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = python_with_doubles(tmp_path_factory.mktemp("other"), sm=89)
    with ssh_server(tmp_path_factory.mktemp("sm89"), other) as server:
        words = ("--target", server.target)
        result = run("fit", home / "model", "--device", "jetson-orin", *words, *SMALL, path=path_to(server))
        assert result.returncode == 2, result.stderr
        assert "SM 89" in result.stderr
        result = run("measure", fitted, *words, path=path_to(server))
        assert result.returncode == 4, result.stderr
        assert "the bundle is for SM 87" in result.stderr


def test_on_a_double_a_newer_tensorrt_updates_the_cache_in_place_and_an_older_one_joins_it(
    home: Path, python: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """By the version that the device reports: fit, text from the engine, and the same bundle on an older device."""
    folder = tmp_path_factory.mktemp("newer")
    newer = python_with_doubles(folder / "python", version="10.16.1.11")
    bundle = folder / "bundle"
    words = ["fit", home / "model", "--device", "jetson-orin", "--memory", "99%"]
    words += ["--calibration", home / "text.txt", "--output", bundle, "--cache", "float"]
    with ssh_server(tmp_path_factory.mktemp("device"), newer) as server:
        nvidia_smi(server.folder / "device-bin")
        result = run(*words, "--target", server.target, *SMALL, path=path_to(server))
        assert result.returncode == 0, result.stderr
        server.wait_until_quiet()
    report = Report.model_validate_json((bundle / "report.json").read_text())
    dialect = next(choice for choice in report.choices if choice.name == "dialect")
    assert dialect.value == "opset24"
    assert "TensorRT 10.16.1.11 writes new keys and values into the KV cache in place" in dialect.reason
    # The engine generates what the processor does, as far as two words of a random model lie apart in fp16.
    site, only = next((folder / "python" / "lib").glob("python3*")) / "site-packages", folder / "only-doubles"
    only.mkdir()
    for name in ("shared_double.py", "tensorrt.py", "cuda"):
        (only / name).symlink_to(site / name)
    asked = ["run", bundle, "--prompt", "the quick", "--max-new-tokens", "4"]
    on_processor, on_engine = run_alone(*asked), run_alone(*asked, python_path=f"{only}:{ROOT}")
    assert "not by the engine" in on_processor.stderr
    assert "not by the engine" not in on_engine.stderr
    assert on_engine.stdout == on_processor.stdout
    # An older device builds the graph whose cache is joined, in two buffers, and the report says why.
    with ssh_server(tmp_path_factory.mktemp("older"), python) as server:
        nvidia_smi(server.folder / "device-bin")
        result = run("measure", bundle, "--target", server.target, "--json", path=path_to(server))
        assert result.returncode == 0, result.stderr
        server.wait_until_quiet()
    measured = Report.model_validate_json(result.stdout)
    assert any("TensorRT 10.3.0 is older than 10.15" in text for text in measured.warnings)
    assert any("built from model.primitive.last.onnx, not from model.opset24.last.onnx" in w for w in measured.warnings)
    caches = [one.fitted.performance.memory["cache"].value for one in (report, measured)]
    assert caches[1] == 2 * caches[0]
