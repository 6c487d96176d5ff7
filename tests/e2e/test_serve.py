"""`edgeprune serve` by the real command line, on the bundle of a real fit."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest

from tests.support import ROOT
from tests.support.bundles import fitted
from tests.support.commands import run
from tests.support.device import ON_DEVICE, Server, bare_python, ssh_server

PROMPT = "the quick brown fox"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fitted(tmp_path_factory)


@contextmanager
def serving(bundle: Path, *options: str, path: str | None = None) -> Iterator[tuple[subprocess.Popen, str]]:
    """The process and its address; path: where it finds ssh."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | ({"PATH": path} if path else {})
    command = [sys.executable, "-m", "edgeprune.cli", "serve", str(bundle), "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        line = process.stdout.readline()
        assert line.startswith(f"Serving {bundle.name} at http://127.0.0.1:"), line + process.stderr.read()
        yield process, line.split()[3].rstrip(",")
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


@pytest.mark.slow
def test_the_served_bundle_answers_as_run_does_until_a_signal(bundle: Path, tmp_path: Path) -> None:
    """Behind a key from a file, with several slots."""
    key = tmp_path / "key"
    key.write_text("a-key\n")
    with serving(bundle, "--slots", "3", "--api-key-file", str(key)) as (process, address):
        client = openai.OpenAI(base_url=address, api_key="a-key", max_retries=0)
        answer = client.completions.create(model=bundle.name, prompt=PROMPT, max_tokens=9, temperature=0)
        pieces = client.completions.create(model=bundle.name, prompt=PROMPT, max_tokens=9, temperature=0, stream=True)
        assert "".join(piece.choices[0].text for piece in pieces) == answer.choices[0].text
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=address, api_key="b", max_retries=0).models.list()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.strip().splitlines()[-1].startswith("interrupted")
    assert "Traceback" not in said
    told = run("run", bundle, "--prompt", PROMPT, "--max-new-tokens", "9")
    assert told.stdout.strip().startswith(answer.choices[0].text.strip().rstrip("\ufffd"))
    assert answer.usage.completion_tokens > 2


def test_what_cannot_be_served_has_one_message(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for words, message in (
            ((tmp_path / "none",), "is not a bundle"),
            ((bundle, "--port", port), f"cannot listen at 127.0.0.1:{port}"),
            ((bundle, "--host", "no.such.host.invalid"), "is no address"),
            ((bundle, "--port", "0", "--api-key-file", tmp_path / "empty"), "holds no key"),
            ((bundle, "--slots", "0"), "--slots"),
        ):
            result = run("serve", *words)
            assert result.returncode == 2, result.stderr
            assert message in result.stderr
            assert "Traceback" not in result.stderr


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("device")
    with ssh_server(folder, bare_python(folder / "venv", (*ON_DEVICE, "tokenizers"))) as running:
        yield running


@pytest.mark.slow
def test_a_device_serves_and_its_port_is_forwarded_until_a_signal(bundle: Path, device: Server) -> None:
    """The answer is that of this machine; nothing is left there but the files for the next time."""
    path = f"{device.folder}/bin:{os.environ['PATH']}"
    with serving(bundle, "--target", device.target, path=path) as (process, address):
        client = openai.OpenAI(base_url=address, api_key="none", max_retries=0)
        answer = client.completions.create(model=bundle.name, prompt=PROMPT, max_tokens=9, temperature=0)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "send to the device: " in said
    assert "Traceback" not in said
    device.wait_until_quiet()
    with serving(bundle) as (_, address):
        client = openai.OpenAI(base_url=address, api_key="none", max_retries=0)
        here = client.completions.create(model=bundle.name, prompt=PROMPT, max_tokens=9, temperature=0)
    assert answer.choices[0].text == here.choices[0].text
    assert answer.usage.completion_tokens > 2


@pytest.mark.slow
def test_a_device_that_cannot_serve_has_one_message(bundle: Path, device: Server, tmp_path_factory) -> None:
    """Of a module that is missing there, and of a port that is taken here, before anything is sent."""
    path = f"{device.folder}/bin:{os.environ['PATH']}"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = run("serve", bundle, "--target", device.target, "--port", port, path=path)
        assert (result.returncode, "cannot listen at" in result.stderr) == (2, True), result.stderr
    folder = tmp_path_factory.mktemp("without")
    with ssh_server(folder, bare_python(folder / "venv")) as bare:
        result = run(
            "serve", bundle, "--target", bare.target, "--port", "0", path=f"{bare.folder}/bin:{os.environ['PATH']}"
        )
        bare.wait_until_quiet()
    assert result.returncode == 4, result.stderr
    assert "the Python module tokenizers is missing" in result.stderr
    assert "pip install tokenizers" in result.stderr
