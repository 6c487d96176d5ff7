"""serve.pyz in a bare virtual environment, through OpenAI's own client and by raw bytes."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import openai
import pytest

from edgeprune.generate.text import stream_text
from edgeprune.ondevice.onnxruntime import GRAPH_FILE, GraphRunner
from edgeprune.ondevice.protocol import MOST_BYTES
from edgeprune.ondevice.serve import Server, open_to_serve
from edgeprune.ondevice.serving import Runners, Service
from edgeprune.ondevice.words import DeviceTokenizer, TokenizerWords
from tests.support.bundles import copy_of, fitted, rewrite
from tests.support.device import ON_DEVICE, bare_python

pytestmark = pytest.mark.slow

PROMPT, COUNT = "the quick brown fox", 9
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a chat template."""
    bundle = copy_of(fitted(tmp_path_factory), tmp_path_factory.mktemp("served") / "bundle")
    config = json.loads((bundle / "tokenizer" / "tokenizer_config.json").read_text()) | {"chat_template": TEMPLATE}
    rewrite(bundle, "tokenizer/tokenizer_config.json", json.dumps(config).encode())
    return bundle


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bare_python(tmp_path_factory.mktemp("venv"), (*ON_DEVICE, "tokenizers"))


def started(python: Path, bundle: Path, *options: str) -> subprocess.Popen:
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(bundle.parent), "PYTHONUNBUFFERED": "1"}
    command = [python, bundle / "serve.pyz", "--port", "0", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@contextmanager
def serving(python: Path, bundle: Path, *options: str) -> Iterator[tuple[subprocess.Popen, str]]:
    process = started(python, bundle, *options)
    try:
        line = process.stdout.readline()
        assert line.startswith("Serving bundle at http://127.0.0.1:"), line + process.stderr.read()
        yield process, line.split()[3].rstrip(",")
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def server(python: Path, bundle: Path) -> Iterator[tuple[subprocess.Popen, str]]:
    with serving(python, bundle, "--slots", "2", "--queue", "0") as found:
        yield found


@pytest.fixture
def client(server: tuple[subprocess.Popen, str]) -> openai.OpenAI:
    return openai.OpenAI(base_url=server[1], api_key="none", max_retries=0)


def test_it_answers_as_the_workstation_does(client: openai.OpenAI, bundle: Path) -> None:
    chat = [{"role": "user", "content": PROMPT}]
    # Without half a character at its end, and with the token that ends it, where that has a text.
    told = "".join(stream_text(bundle, PROMPT, COUNT, 0.0, 0, 1.0, 0, pytest.fail))
    asked = {"model": "bundle", "messages": chat, "max_tokens": COUNT, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    pieces = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert told.startswith(whole.choices[0].message.content.rstrip("\ufffd"))
    assert whole.usage.completion_tokens > 2
    streamed = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert streamed == whole.choices[0].message.content
    assert pieces[-1].usage.total_tokens == whole.usage.total_tokens
    assert [model.id for model in client.models.list()] == ["bundle"]


def read(address: str, lines: str, body: bytes = b"") -> tuple[int, bytes]:
    """Status and body of the answer to these bytes."""
    host, port = address.removeprefix("http://").removesuffix("/v1").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(lines.encode() + b"\r\n\r\n" + body)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    top, _, rest = answer.partition(b"\r\n\r\n")
    return int(top.split()[1]), rest


@pytest.mark.parametrize(
    ("path", "body", "length", "status", "message"),
    [
        ("chat/completions", b"{", "1", 400, b"not JSON"),
        ("completions", b'{"prompt": ""}', "14", 400, b"the prompt is empty"),
        ("completions", b"", None, 411, b"no Content-Length"),
        ("completions", b"", str(MOST_BYTES + 1), 413, b"longer than 4 MiB"),
        ("embeddings", b"{}", "2", 404, b"POST /v1/embeddings is not served here"),
    ],
)
def test_what_clients_send_wrong_has_one_message(
    server: tuple[subprocess.Popen, str], path: str, body: bytes, length: str | None, status: int, message: bytes
) -> None:
    head = f"POST /v1/{path} HTTP/1.1\r\nHost: x\r\nConnection: close"
    found, text = read(server[1], head + (f"\r\nContent-Length: {length}" if length else ""), body)
    assert found == status
    assert message in text


def test_health_and_metrics_need_no_key_and_the_rest_does(python: Path, bundle: Path, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("a-key\n")
    with serving(python, bundle, "--api-key-file", str(key)) as (process, address):
        close = "HTTP/1.1\r\nHost: x\r\nConnection: close"
        assert read(address, f"GET /health {close}") == (200, b'{"status": "ok"}')
        assert b"edgeprune_requests_ended_total 0" in read(address, f"GET /metrics {close}")[1]
        assert read(address, f"GET /v1/models {close}")[0] == 401
        assert read(address, f"GET /v1/models {close}\r\nAuthorization: Bearer a-key")[0] == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0


class Slow(GraphRunner):
    """A step takes a tenth of a second."""

    def advance(self, tokens: np.ndarray, pasts: np.ndarray) -> np.ndarray:
        time.sleep(0.1)
        return super().advance(tokens, pasts)


def test_a_client_that_goes_away_ends_the_answer_that_it_waits_for(bundle: Path) -> None:
    """One that is not streamed: nothing is sent before its end. To its end it would take four seconds."""
    chosen = open_to_serve(bundle)
    graph, tokenizer = chosen.folder / "onnx" / GRAPH_FILE, DeviceTokenizer(chosen.tokenizer)
    body = json.dumps({"prompt": PROMPT, "max_tokens": 40}).encode()
    with Service(lambda: Runners.of_rows(Slow(graph, 1, chosen.workload.context)), 0) as service:
        words = TokenizerWords(tokenizer, frozenset(), service.vocab_size)
        with Server(("127.0.0.1", 0), service, words, "small", None) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            with socket.create_connection(server.server_address) as client:
                head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
                client.sendall(head.encode() + body)
                wait_until(lambda: service.counts.new_tokens)
            wait_until(lambda: service.counts.cancelled + service.counts.ended)
            server.shutdown()
        assert (service.counts.cancelled, service.counts.ended) == (1, 0)


def wait_until(is_so: Callable[[], int]) -> None:
    end = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_what_cannot_be_served_has_one_message(python: Path, bundle: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for words, code, message in (
            ((str(tmp_path),), 2, "is not a bundle"),
            (("--port", str(taken.getsockname()[1])), 2, "cannot listen at"),
            (("--api-key-file", str(tmp_path / "none")), 2, "cannot"),
        ):
            process = started(python, bundle, *words)
            _, said = process.communicate(timeout=60)
            assert process.returncode == code, said
            assert message in said
            assert "Traceback" not in said
