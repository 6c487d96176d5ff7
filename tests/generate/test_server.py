"""The HTTP server on a real graph: through OpenAI's own client, and by raw bytes."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest
import uvicorn

from edgeprune.chats import encode, render
from edgeprune.engine.onnx.graph import ONNXRUNTIME_GRAPH, write_graphs
from edgeprune.generate.server import app_of, words_of
from edgeprune.model.tokens.tokenizer import load_tokenizer
from edgeprune.ondevice.onnxruntime import GraphRunner
from edgeprune.ondevice.protocol import MOST_BYTES
from edgeprune.ondevice.sampling import generate
from edgeprune.ondevice.serving import Runners, Service
from tests.support.checkpoints import save_tokenizer
from tests.support.graph_models import llama
from tests.support.reference import decoder_of, weights_of

CONTEXT = 200
TEMPLATE = (
    "{% for t in tools or [] %}[{{ t['function']['name'] }}]{% endfor %}"
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph, and a tokenizer with a chat template."""
    folder, model = tmp_path_factory.mktemp("served"), llama(True, vocab_size=257, max_position_embeddings=CONTEXT)
    write_graphs(decoder_of(model.config), weights_of(model), folder, "fp32", [ONNXRUNTIME_GRAPH])
    save_tokenizer(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": TEMPLATE}))
    return folder


@contextmanager
def served(folder: Path, key: str | None = None, slots: int = 2, waiting: int = 4) -> Iterator[tuple[str, Service]]:
    """The address of a server in a thread of its own."""

    def runners() -> Runners:
        return Runners.of_rows(GraphRunner(folder / ONNXRUNTIME_GRAPH.filename, slots, CONTEXT))

    with socket.socket() as listener, Service(runners, waiting) as service:
        listener.bind(("127.0.0.1", 0))
        app = app_of(service, words_of(folder, service.vocab_size), "small", key)
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", service
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[tuple[str, Service]]:
    with served(folder) as found:
        yield found


def client_of(address: str, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0)


@pytest.fixture
def client(server: tuple[str, Service]) -> openai.OpenAI:
    return client_of(server[0])


def expected(folder: Path, prompt: str, count: int, special: bool = True) -> str:
    """What the graph continues greedily."""
    tokenizer = load_tokenizer(folder)
    runner = GraphRunner(folder / ONNXRUNTIME_GRAPH.filename, 1, CONTEXT)
    ids = encode(tokenizer, prompt, special=special)
    ids = [int(tokens[0]) for tokens in generate(runner, [ids], count, end_ids={tokenizer.eos_token_id})]
    return tokenizer.decode(ids, skip_special_tokens=True)


def chat_text(folder: Path, messages: list, tools: list | None = None) -> str:
    return render(load_tokenizer(folder), messages, tools, prompted=True)


def test_a_chat_is_answered_in_the_template_with_its_usage(folder: Path, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="small", messages=HELLO, max_tokens=20, temperature=0)
    prompt = chat_text(folder, HELLO)
    assert answer.choices[0].message.content == expected(folder, prompt, 20, special=False)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason in ("length", "stop")
    assert answer.usage.prompt_tokens == len(encode(load_tokenizer(folder), prompt, special=False))
    assert answer.usage.completion_tokens <= 20
    assert answer.model == "small"


def test_a_stream_holds_the_same_text_in_pieces(client: openai.OpenAI) -> None:
    asked = {"model": "small", "messages": HELLO, "max_tokens": 20, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    pieces = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert pieces[0].choices[0].delta.role == "assistant"
    texts = [piece.choices[0].delta.content or "" for piece in pieces if piece.choices]
    assert "".join(texts) == whole.choices[0].message.content
    assert len([text for text in texts if text]) > 5
    assert [piece.choices[0].finish_reason for piece in pieces[:-1]][-1] == whole.choices[0].finish_reason
    assert pieces[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_a_text_is_completed_and_so_are_token_ids(folder: Path, client: openai.OpenAI) -> None:
    ids = encode(load_tokenizer(folder), "once upon")
    answers = [
        client.completions.create(model="small", prompt=prompt, max_tokens=12, temperature=0, logprobs=2)
        for prompt in ("once upon", ids)
    ]
    assert answers[0].choices[0].text == answers[1].choices[0].text == expected(folder, "once upon", 12)
    found = answers[0].choices[0].logprobs
    assert len(found.tokens) == 12
    assert answers[0].choices[0].text.startswith(found.tokens[0])
    pairs = zip(found.top_logprobs, found.token_logprobs, strict=True)
    assert all(max(best.values()) == logprob for best, logprob in pairs)
    assert found.text_offset[0] == 0


def test_a_seed_draws_the_same_again(client: openai.OpenAI) -> None:
    asked = {"model": "small", "messages": HELLO, "max_tokens": 20, "temperature": 1.5, "extra_body": {"top_k": 50}}
    texts = [client.chat.completions.create(**asked, seed=seed).choices[0].message.content for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("stream", [True, False])
def test_a_stop_text_ends_the_answer_before_it(client: openai.OpenAI, stream: bool) -> None:
    """Though it comes in several tokens: nothing of it is shown."""
    asked = {"model": "small", "messages": HELLO, "max_tokens": 40, "temperature": 0}
    text = client.chat.completions.create(**asked).choices[0].message.content
    stop = text[10:13]
    answer = client.chat.completions.create(**asked, stop=["never comes", stop], stream=stream)
    if stream:
        pieces = [piece.choices[0] for piece in answer]
        found, reason = "".join(piece.delta.content or "" for piece in pieces), pieces[-1].finish_reason
    else:
        found, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
    assert found == text[: text.index(stop)]
    assert reason == "stop"


def test_tools_are_rendered_by_the_template(folder: Path, client: openai.OpenAI) -> None:
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
    answer = client.chat.completions.create(model="small", messages=HELLO, tools=tools, max_tokens=8, temperature=0)
    prompt = chat_text(folder, HELLO, tools)
    assert "[weather]" in prompt
    assert answer.choices[0].message.content == expected(folder, prompt, 8, special=False)


def test_log_probabilities_of_a_chat_cover_its_text(client: openai.OpenAI) -> None:
    asked = {"model": "small", "messages": HELLO, "max_tokens": 12, "temperature": 0}
    for stream in (False, True):
        answer = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3, stream=stream)
        choices = [piece.choices[0] for piece in answer] if stream else answer.choices
        tokens = [token for choice in choices if choice.logprobs for token in choice.logprobs.content]
        assert len(tokens) == 12
        assert all(token.top_logprobs[0].logprob == token.logprob <= 0 for token in tokens)


def test_models_health_and_metrics(server: tuple[str, Service], client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["small"]
    before = read(server[0], "GET /metrics")[1]
    client.chat.completions.create(model="small", messages=HELLO, max_tokens=3, temperature=0)
    assert json.loads(read(server[0], "GET /health")[1]) == {"status": "ok"}
    values = [
        dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        for text in (before, read(server[0], "GET /metrics")[1])
    ]
    grown = {name: float(values[1][name]) - float(values[0][name]) for name in values[0]}
    assert grown["edgeprune_requests_ended_total"] == 1
    assert grown["edgeprune_time_to_first_token_seconds_count"] == 1
    assert grown["edgeprune_time_per_output_token_seconds_count"] == grown["edgeprune_new_tokens_total"] - 1
    assert float(values[1]["process_resident_memory_bytes"]) > 1e7


def read(address: str, first_line: str, body: bytes = b"", headers: str = "") -> tuple[int, str]:
    """Status and body of the answer to these bytes."""
    host, port = address.removeprefix("http://").split(":")
    head = f"{first_line} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(head.encode() + body)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    top, _, rest = answer.partition(b"\r\n\r\n")
    return int(top.split()[1]), rest.decode()


@pytest.mark.parametrize(
    ("line", "body", "status", "message"),
    [
        ("POST /v1/chat/completions", b"{", 400, "not JSON"),
        ("POST /v1/chat/completions", b'{"messages": []}', 400, "messages is missing"),
        ("POST /v1/chat/completions", b'{"model": "other", "messages": [{"role": "user"}]}', 404, "no model 'other'"),
        ("POST /v1/completions", b'{"prompt": [999]}', 400, "the token 999"),
        ("POST /v1/completions", b'{"prompt": ""}', 400, "the prompt is empty"),
        ("POST /v1/completions", json.dumps({"prompt": "a" * 300}).encode(), 400, "exceeds the context of 200"),
        ("POST /v1/completions", b'{"prompt": "a", "max_tokens": 500}', 400, "and 500 new ones exceeds"),
        ("POST /v1/completions", b" " * (MOST_BYTES + 1), 413, "longer than 4 MiB"),
        ("GET /v1/completions", b"", 405, "GET /v1/completions is not served"),
        ("POST /v1/embeddings", b"{}", 404, "is not served"),
    ],
)
def test_what_clients_send_wrong_has_one_message(
    server: tuple[str, Service], line: str, body: bytes, status: int, message: str
) -> None:
    found, text = read(server[0], line, body)
    assert found == status
    assert message in json.loads(text)["error"]["message"]


def test_requests_side_by_side_get_the_answers_that_each_gets_alone(folder: Path, client: openai.OpenAI) -> None:
    prompts = [f"number {index} of " * (index + 1) for index in range(5)]
    texts: dict[str, str] = {}

    def ask(prompt: str) -> None:
        answer = client.completions.create(model="small", prompt=prompt, max_tokens=30, temperature=0)
        texts[prompt] = answer.choices[0].text

    threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {prompt: expected(folder, prompt, 30) for prompt in prompts}


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that a client can overtake: an answer of 190 tokens takes seconds."""
    run = GraphRunner.run

    def delayed(self: GraphRunner, *args: object) -> object:
        time.sleep(0.02)
        return run(self, *args)

    monkeypatch.setattr(GraphRunner, "run", delayed)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_ends_its_request(server: tuple[str, Service], slow: None, stream: bool) -> None:
    address, service = server
    before, drawn = service.counts.cancelled, service.counts.new_tokens
    body = json.dumps({"prompt": "a", "max_tokens": 190, "stream": stream, "temperature": 0}).encode()
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode())
        connection.sendall(body)
        wait_until(lambda: service.counts.new_tokens > drawn)
    wait_until(lambda: not service.active)
    assert service.counts.cancelled == before + 1
    assert service.counts.new_tokens < drawn + 190


def wait_until(is_so) -> None:  # noqa: ANN001
    end = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_full_queue_says_when_to_come_again(folder: Path, slow: None) -> None:
    with served(folder, slots=1, waiting=0) as (address, _):
        client = client_of(address)
        stream = client.completions.create(model="small", prompt="a", max_tokens=190, temperature=0, stream=True)
        next(iter(stream))
        with pytest.raises(openai.RateLimitError) as refused:
            client.completions.create(model="small", prompt="b", max_tokens=2)
        assert int(refused.value.response.headers["retry-after"]) >= 1
        stream.close()


def test_a_key_is_asked_for_but_not_for_health(folder: Path) -> None:
    with served(folder, key="secret") as (address, _):
        for key in ("wrong", "sécret"):
            body = b'{"prompt": "a"}'
            status, text = read(address, "POST /v1/completions", body, f"Authorization: Bearer {key}\r\n")
            assert status == 401
            assert "secret" not in text
        with pytest.raises(openai.AuthenticationError):
            client_of(address, "other").models.list()
        assert [model.id for model in client_of(address, "secret").models.list()] == ["small"]
        assert read(address, "GET /health")[0] == 200
