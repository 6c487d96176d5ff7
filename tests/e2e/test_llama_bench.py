"""The real command line with llama.cpp on a device behind a real sshd, whose llama-bench is a test double.

The device has numpy and that program alone; files are checked by the real llama.cpp, on this machine.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgeprune.engine.llamacpp import on_llamacpp
from edgeprune.engine.probe import with_figures
from edgeprune.ondevice.bundle import sha256
from edgeprune.profiles import load_profile_file, profile_of, profile_toml
from edgeprune.report.schema import Report
from tests.support import ROOT
from tests.support.checkpoints import save_llama
from tests.support.commands import SHORT, run
from tests.support.device import Server, bare_python, script, ssh_server
from tests.support.llamacpp import VOCABULARY, save_merging_tokenizer

pytestmark = pytest.mark.slow

DOUBLE = ROOT / "tests/support/doubles/double_llama_bench.py"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("device")
    with ssh_server(folder, bare_python(folder / "venv", ("numpy",))) as running:
        script(folder / "device-bin" / "llama-bench", f'exec python3 {DOUBLE} "$@"')
        yield running


@pytest.fixture
def path(server: Server) -> Iterator[str]:
    yield f"{server.folder}/bin:{os.environ['PATH']}"
    server.wait_until_quiet()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    save_llama(
        folder / "model",
        vocab_size=len(VOCABULARY),
        num_hidden_layers=2,
        hidden_size=256,
        num_attention_heads=4,
        head_dim=64,
        intermediate_size=512,
        initializer_range=0.05,
    )
    save_merging_tokenizer(folder / "model")
    (folder / "text.txt").write_text("\n\n".join(f"the quick brown fox jumps over {n} dogs " * 6 for n in range(40)))
    (folder / "device.toml").write_text(profile_toml(with_figures(profile_of("cpu", None))))
    return folder


def fit(home: Path, server: Server, path: str, *more: str | Path):
    return run(
        *("fit", home / "model", "--profile", home / "device.toml", "--engine", "llama.cpp"),
        *("--target", server.target, "--weights", "int8,float", "--memory", "90%", "--method", "magnitude"),
        *("--calibration", home / "text.txt", *SHORT, *more),
        path=path,
    )


def test_a_fit_and_a_measurement_by_the_devices_llama_bench(home: Path, server: Server, path: str) -> None:
    """All latencies are its answers, at the workload's sizes; what it was given is what the bundle ships."""
    bundle = home / "there"
    result = fit(home, server, path, "--output", bundle)
    assert result.returncode in (0, 3), result.stderr
    report = Report.model_validate_json((bundle / "report.json").read_text())
    assert (report.engine.name, report.rests_on) == ("llama.cpp", "measured")
    performance, file = report.fitted.performance, bundle / "engine" / "model.gguf"
    assert performance.decode.device == "a double's processor"
    assert performance.memory["weights"].value == file.stat().st_size
    assert sha256(file) in server.stored()
    assert any("on the workstation" in name for name in performance.conditions)
    # Of 16 tokens' prompt, and of 16 steps that end at 64.
    size = file.stat().st_size
    assert performance.percentiles["prefill"]["p50"] == pytest.approx(1e-6 * 16 * size, rel=1e-3)
    assert performance.percentiles["decode"]["p50"] == pytest.approx(1e-6 * (10 * size + 100 * 48), rel=1e-3)
    calls = [json.loads(line) for line in (server.home / "llama-bench.calls").read_text().splitlines()]
    sizes = {tuple(words[words.index(name) + 1] for name in ("-p", "-n", "-d")) for words in calls if "-p" in words}
    assert sizes == {("16", "0", "0"), ("0", "16", "48")}
    # The same by `measure`, which has no logits there.
    result = run("measure", bundle, "--target", server.target, path=path)
    assert result.returncode in (0, 3), result.stderr
    measured = Report.model_validate_json((bundle / "report.json").read_text()).measurement
    assert (measured.engine, measured.where) == ("llama-bench", server.target)
    assert any("gives no logits" in note for note in measured.performance["notes"])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("export DOUBLE_RELEASE=old", "is too old: it has no -d"),
        (
            'export PATH="$(dirname "$(command -v python3)")/../empty:/usr/bin:/bin"',
            "it has no llama-bench on its PATH",
        ),
    ],
)
def test_a_device_that_cannot_measure(home: Path, server: Server, path: str, change: str, reason: str) -> None:
    """One message with a remedy, before any work."""
    if "empty" in change:
        (server.folder / "empty").mkdir(exist_ok=True)
        script(server.folder / "empty" / "python3", f'exec "{server.folder}/venv/bin/python3" "$@"')
    with server.login(change):
        result = fit(home, server, path, "--output", home / "nothing")
    assert result.returncode == 2, result.stderr
    assert reason in result.stderr
    assert "whose llama-bench has the option -d" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (home / "nothing").exists()


def test_doctor_says_what_it_finds(home: Path, server: Server, path: str) -> None:
    """Beside a processor's own engine, which is missing here, and alone for a profile of llama.cpp."""
    result = run("doctor", "--target", server.target, "--json", path=path)
    checks = {check["name"]: check for check in json.loads(result.stdout)["checks"]}
    assert checks["llama.cpp"]["state"] == "passed"
    assert f"llama-bench {server.folder}/device-bin/llama-bench of 20" in checks["llama.cpp"]["detail"]
    profile = home / "llamacpp.toml"
    profile.write_text(profile_toml(on_llamacpp(load_profile_file(home / "device.toml"))))
    result = run("doctor", "--target", server.target, "--profile", profile, "--json", path=path)
    names = {check["name"] for check in json.loads(result.stdout)["checks"]}
    assert "llama.cpp" in names
    assert "clock" not in names
