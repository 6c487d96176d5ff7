"""The real command line and a device behind a real sshd on loopback: measured there, and every failure one message."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgeprune.engine.probe import with_figures
from edgeprune.ondevice.bundle import open_bundle, sha256
from edgeprune.profiles import profile_of, profile_toml
from edgeprune.report.schema import Report
from tests.support.bundles import change, contents, copy_of, deployment, fitted
from tests.support.commands import begin, run
from tests.support.device import Server, bare_python, script, ssh_server

pytestmark = pytest.mark.slow

GENEROUS = {"memory": 2.0**40}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("device")
    with ssh_server(folder, bare_python(folder / "venv")) as running:
        yield running


@pytest.fixture
def path(server: Server) -> Iterator[str]:
    """Where the command line finds ssh; whatever it did, nothing is left on the device."""
    yield f"{server.folder}/bin:{os.environ['PATH']}"
    server.wait_until_quiet()


@pytest.fixture
def bundle(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_of(fitted(tmp_path_factory), tmp_path / "bundle", GENEROUS)


def checked(bundle: Path) -> Report:
    hashes = open_bundle(bundle)["sha256"]
    assert {name: sha256(bundle / name) for name in hashes} == hashes
    return Report.model_validate_json((bundle / "report.json").read_text())


def test_measured_there_and_here_and_drawn_again(bundle: Path, server: Server, path: str) -> None:
    result = run("measure", bundle, "--target", server.target, "--json", path=path)
    assert result.returncode == 0, result.stderr
    report = checked(bundle)
    assert Report.model_validate_json(result.stdout) == report
    assert (report.measurement.where, report.measurement.rung) == (server.target, 0)
    assert (report.status, report.rests_on) == ("met", "measured")
    assert sha256(bundle / "rungs/0/onnx/model.onnx.data") in server.stored()
    here = run("measure", bundle)
    assert here.returncode == 0, here.stderr
    assert "met" in here.stdout
    assert checked(bundle).measurement.where == "this machine"
    page = (bundle / "report.html").read_text()
    again = run("report", bundle)
    assert again.returncode == 0, again.stderr
    assert len((bundle / "report.html").read_text()) == pytest.approx(len(page), rel=0.01)
    checked(bundle)


def test_a_fit_that_measures_there(server: Server, path: str, tmp_path: Path, tmp_path_factory) -> None:
    """The dense model and the candidate: all that the verdict rests on is the device's."""
    home = fitted(tmp_path_factory).parent
    (tmp_path / "device.toml").write_text(profile_toml(with_figures(profile_of("cpu", None))))
    result = run(
        "fit",
        home / "model",
        "--profile",
        tmp_path / "device.toml",
        "--target",
        server.target,
        "--memory",
        "90%",
        "--output",
        tmp_path / "there",
        "--calibration",
        home / "text.txt",
        "--samples",
        "4",
        "--length",
        "32",
        "--prompt",
        "16",
        "--context",
        "64",
        "--method",
        "magnitude",
        "--json",
        path=path,
    )
    assert result.returncode in (0, 3), result.stderr
    report = Report.model_validate_json(result.stdout)
    assert report.rests_on == "measured"
    assert server.target in json.dumps(report.model_dump())


def failing(bundle: Path, target: str, path: str, message: str, remedy: str = "") -> None:
    """Exit code 4, one message with a remedy, and a bundle that is as it was."""
    before = contents(bundle)
    result = run("measure", bundle, "--target", target, path=path)
    assert result.returncode == 4, result.stderr
    error, advice = result.stderr.strip().splitlines()[-2:]
    assert error.startswith(f"error: {target}")
    assert message in error
    assert advice
    assert remedy in advice
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert contents(bundle) == before


def test_bad_addresses_are_bad_input(bundle: Path, server: Server, path: str) -> None:
    for target in ("ssh://-oProxyCommand=x@h", "ssh://user:secret@h", "nvidia@orin"):
        result = run("measure", bundle, "--target", target, path=path)
        assert result.returncode == 2
        assert "secret" not in result.stderr
    assert run("measure", bundle, "--keep-remote", path=path).returncode == 2


def test_a_device_that_cannot_be_reached(bundle: Path, server: Server, path: str, tmp_path: Path) -> None:
    failing(bundle, "ssh://127.0.0.1:1", path, "refuses the connection")
    failing(bundle, "ssh://no-such-host.invalid", path, "its name is not known")
    other = f"[127.0.0.1]:{server.port} {(server.folder / 'user.pub').read_text()}"
    for name, message, settings in (
        ("unknown", "its host key is not known yet", {"known_hosts": ""}),
        ("other", "its host key is not the known one", {"known_hosts": other}),
        ("stranger", "does not let this user in", {"identity": server.folder / "host"}),
    ):
        (tmp_path / name).mkdir()
        failing(bundle, server.target, server.client(tmp_path / name, **settings), message)


@pytest.mark.parametrize("packages", [(), ("numpy",)])
def test_a_module_that_is_missing_there(
    bundle: Path, server: Server, path: str, tmp_path: Path, packages: tuple[str, ...]
) -> None:
    name = "onnxruntime" if packages else "numpy"
    script(tmp_path / "python3", f'exec "{bare_python(tmp_path / "venv", packages)}" "$@"')
    with server.login(f"PATH={tmp_path}:$PATH"):
        failing(bundle, server.target, path, name, remedy=f"pip install {name}")


def test_no_python_there(bundle: Path, server: Server, path: str) -> None:
    with server.login("PATH=/nothing"):
        failing(bundle, server.target, path, "has no python3")


def test_working_folders_are_kept_where_asked(bundle: Path, server: Server, path: str) -> None:
    result = run("measure", bundle, "--target", server.target, "--keep-remote", path=path)
    assert result.returncode == 0, result.stderr
    kept = server.working_folders()
    assert {entry.name for folder in kept for entry in folder.iterdir()} >= {"graph", "reference", "candidate"}
    for folder in kept:
        shutil.rmtree(folder)


def start(bundle: Path, server: Server, path: str) -> subprocess.Popen:
    """The command line, after its measurement has begun on the device."""
    process = begin(
        "measure",
        bundle,
        "--target",
        server.target,
        path=path,
        seconds=60.0,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a shell's background ignores it
    )
    end, seen = time.monotonic() + 60, set()
    while time.monotonic() < end and len(seen) < 3:  # describe, check, measure
        seen.add(server.task())
    return process


@pytest.mark.parametrize("victim", ["command line", "ssh", "task"])
def test_killed_in_the_middle(bundle: Path, server: Server, path: str, victim: str) -> None:
    change(bundle, rungs=deployment(bundle)["rungs"][:1])  # there is no smaller one to go on with
    before = contents(bundle)
    process = start(bundle, server, path)
    match victim:
        case "command line":
            process.send_signal(signal.SIGKILL)
        case "ssh":
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            (ssh,) = [int(pid) for pid in children if "ssh_config" in Path(f"/proc/{pid}/cmdline").read_text()]
            os.kill(ssh, signal.SIGKILL)
        case "task":
            os.kill(server.task(), signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    server.wait_until_quiet(10)
    assert contents(bundle) == before
    assert "Traceback" not in said
    if victim != "command line":
        assert process.returncode == 4
        assert f"the connection to {server.target} was lost" in said or "was ended by SIGKILL" in said


def test_interrupted_by_the_user(bundle: Path, server: Server, path: str) -> None:
    before = contents(bundle)
    process = start(bundle, server, path)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it: to ssh too
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in said
    server.wait_until_quiet(10)
    assert contents(bundle) == before
