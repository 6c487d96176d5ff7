"""How a bundle was made: a command line that asks for the same again, versions, the time."""

from __future__ import annotations

import platform
import shlex
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edgeprune.cli.app import app
from edgeprune.pipeline.provenance import command_line, manifest_of, now, versions
from edgeprune.pipeline.request import Request, request_of
from tests.support.runs import home, setup_of


class Asked(Exception):
    """Ends a command where its work would begin."""


def parsed(monkeypatch, line: str) -> Request:
    """The request that a command line asks for."""
    requests = []

    def begin(progress, **options):
        requests.append(request_of(**options))
        raise Asked

    for name in ("fit", "frontier"):
        monkeypatch.setattr(f"edgeprune.commands.{name}.{name}", begin)
    program, *words = shlex.split(line)
    assert program == "edgeprune"
    result = CliRunner().invoke(app, words)
    assert isinstance(result.exception, Asked), result.output
    return requests[0]


@pytest.mark.parametrize(
    "request_",
    [
        Request(device="cpu"),
        Request(model="my model's", device="l4", memory="90%", decode="25ms", max_quality_loss="2.5%", seed=7),
        Request(profile=Path("a b.toml"), evaluate=(Path("a.txt"), Path("b c.txt")), export=("gguf",)),
        Request(device="cpu", checkpoint=False, keep_remote=True, require_measured=True, target="ssh://me@board"),
        Request(device="cpu", rungs=3, layout="per-layer", vocabulary="samples", precision="bf16", output=Path("o")),
    ],
)
def test_the_command_line_asks_for_the_same_again(monkeypatch, request_):
    assert parsed(monkeypatch, command_line(request_)) == request_


def test_to_go_on_or_to_replace_is_not_asked_again():
    assert command_line(Request(device="cpu", resume=True, force=True)) == "edgeprune fit demo --device cpu"


@pytest.mark.parametrize("rungs", [1, 3, 6])
def test_a_frontier_names_its_rungs_and_no_budget(monkeypatch, rungs):
    request = Request(device="cpu", rungs=rungs, memory="90%")
    line = command_line(request, "frontier", left_out=("memory",))
    assert "--memory" not in line
    assert parsed(monkeypatch, line) == Request(device="cpu", rungs=rungs)


def test_versions_are_those_that_are_installed():
    found = versions()
    assert found["python"] == platform.python_version()
    assert found["torch"] == version("torch")
    assert found["onnxruntime"] == version("onnxruntime")
    assert all(found.values())


def test_the_manifest_names_the_run(tmp_path_factory, tmp_path):
    setup = setup_of(home(tmp_path_factory), tmp_path / "out", seed=5)
    manifest = manifest_of(setup, "the command", "ab12")
    assert (manifest["command"], manifest["device"], manifest["seed"]) == ("the command", "jetson-orin", 5)
    assert manifest["run"] == "ab12"
    assert (manifest["engine"], manifest["fingerprint"]) == (setup.engine.name, setup.fingerprint)
    age = datetime.now(UTC) - datetime.fromisoformat(manifest["created"])
    assert timedelta(0) <= age < timedelta(minutes=1)
    assert now().endswith("+00:00")
