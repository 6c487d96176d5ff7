"""The containers and the service by their files: what they name exists, and what they start takes their options."""

from __future__ import annotations

import configparser
import json
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.main import get_command

from edgeprune.cli.app import app
from edgeprune.report.deploy import FINISH, SERVE
from tests.support import ROOT

FOLDER = ROOT / "tools" / "containers"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def instructions(name: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile and what stands behind them."""
    lines = (line for line in (FOLDER / name).read_text().splitlines() if line and not line.startswith("#"))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines)]


def told(name: str, word: str) -> list[str]:
    return [rest for found, rest in instructions(name) if found == word]


def by_hand(name: str) -> list[list[str]]:
    """The commands in the comments at a file's beginning."""
    lines = (FOLDER / name).read_text().splitlines()
    return [shlex.split(line.removeprefix("#")) for line in lines if line.startswith("#   ")]


def takes(arguments: list[str]) -> None:
    """serve.pyz takes these options."""
    result = subprocess.run(
        [sys.executable, "-m", "edgeprune.ondevice.serve", *arguments, "--help"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr
    for option in (one for one in arguments if one.startswith("--")):
        assert option in result.stdout


@pytest.mark.parametrize("name", ["workstation.Dockerfile", "jetpack.Dockerfile"])
def test_a_container_begins_with_its_base_and_is_no_root_shell(name: str) -> None:
    kinds = [word for word, _ in instructions(name)]
    assert kinds[:2] == ["ARG", "FROM"]
    assert told(name, "FROM") == ["${BASE}"]
    assert set(kinds) <= {
        "ARG",
        "FROM",
        "RUN",
        "WORKDIR",
        "COPY",
        "USER",
        "EXPOSE",
        "ENTRYPOINT",
        "CMD",
        "VOLUME",
        "HEALTHCHECK",
    }
    assert told(name, "EXPOSE") == ["8000"]
    for kind in ("ENTRYPOINT", "CMD"):
        assert all(isinstance(json.loads(words), list) for words in told(name, kind))


def test_the_workstations_copies_what_is_there_and_starts_the_command() -> None:
    name = "workstation.Dockerfile"
    for words in map(str.split, told(name, "COPY")):
        assert all((ROOT / source).exists() for source in words[:-1])
    packed = {source for words in told(name, "COPY") for source in words.split()[:-1]}
    assert {PROJECT["readme"], *PROJECT["license-files"], "edgeprune", "profiles", "pyproject.toml"} <= packed
    assert json.loads(told(name, "ENTRYPOINT")[0]) == list(PROJECT["scripts"])
    (extras,) = (rest.partition("=")[2] for rest in told(name, "ARG") if rest.startswith("EXTRAS"))
    assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])
    commands = get_command(app).commands
    for words in by_hand(name)[1:]:
        chosen, *rest = words[words.index("edgeprune") + 1 :]
        commands[chosen].make_context(chosen, rest, resilient_parsing=True)


def test_the_devices_installs_what_the_bundles_programs_ask_for_and_starts_the_server() -> None:
    name = "jetpack.Dockerfile"
    installed = shlex.split(told(name, "RUN")[0])
    assert installed[:5] == ["python3", "-m", "pip", "install", "--no-cache-dir"]
    assert [one.partition("=")[0] for one in installed[5:]] == ["numpy", "tokenizers", "cuda-python"]
    assert {"ARG CUDA=13", "VOLUME /bundle"} <= {" ".join(one) for one in instructions(name)}
    program, script, *options = json.loads(told(name, "ENTRYPOINT")[0])
    assert (program, script) == ("python3", f"/bundle/{SERVE}")
    takes([*options, *json.loads(told(name, "CMD")[0])])
    assert by_hand(name)[1][-2:] == ["edgeprune-serve", f"/bundle/{FINISH}"]


def test_the_service_starts_the_bundles_program_with_options_that_it_takes() -> None:
    unit = configparser.ConfigParser(strict=True, interpolation=None, comment_prefixes=("#",))
    unit.optionxform = str
    unit.read(FOLDER / "edgeprune-serve.service")
    python, script, *options = shlex.split(unit["Service"]["ExecStart"])
    assert (python, Path(script).name) == ("/usr/bin/python3", SERVE)
    takes(options)
    copied = [words[-1] for words in by_hand("edgeprune-serve.service")]
    assert str(Path(script).parent) in copied
    assert unit["Service"]["LoadCredential"].partition(":")[2] in copied
    assert options[-1] == "${CREDENTIALS_DIRECTORY}/" + unit["Service"]["LoadCredential"].partition(":")[0]
