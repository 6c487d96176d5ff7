"""Bodies of requests: what is read, what is refused, and the documents of answers."""

from __future__ import annotations

import json

import pytest

from edgeprune.ondevice.protocol import CHAT, TEXT, Refused, parsed
from edgeprune.ondevice.sampling import Drawing

HELLO = [{"role": "user", "content": "hello"}]


def chat(**fields: object) -> bytes:
    return json.dumps({"model": "m", "messages": HELLO} | fields).encode()


def test_a_chat_with_nothing_but_messages_has_openai_s_defaults() -> None:
    request = parsed(b'{"messages": [{"role": "user", "content": "hello"}]}', CHAT, "m")
    assert request.messages == HELLO
    assert (request.most, request.stop, request.likeliest, request.stream) == (None, (), None, False)
    assert (request.drawing.temperature, request.drawing.top_p, request.drawing.top_k) == (1.0, 1.0, 0)


def test_all_that_is_supported_is_read() -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    request = parsed(
        chat(
            messages=[{"role": "system", "content": "be brief"}, {"role": "user", "content": parts, "name": "ann"}],
            tools=[{"type": "function", "function": {"name": "f"}}],
            max_completion_tokens=7,
            temperature=0,
            top_p=0.5,
            top_k=40,
            seed=-1,
            stop=["a", "b"],
            logprobs=True,
            top_logprobs=2,
            stream=True,
            stream_options={"include_usage": True},
            user="somebody",
            n=1,
            presence_penalty=0,
            tool_choice="auto",
        ),
        CHAT,
        "m",
    )
    assert request.messages[1] == {"role": "user", "content": "hello", "name": "ann"}
    assert len(request.tools) == 1
    assert request.drawing == Drawing(0, 0.5, 40, 2**63 - 1)
    assert (request.most, request.stop, request.likeliest) == (7, ("a", "b"), 2)
    assert request.stream
    assert request.with_usage


@pytest.mark.parametrize("prompt", ["once", ["once"], [5, 6], [[5, 6]]])
def test_a_text_completion_takes_one_text_or_one_array_of_ids(prompt: object) -> None:
    request = parsed(json.dumps({"prompt": prompt, "logprobs": 0}).encode(), TEXT, "m")
    assert request.prompt in ("once", [5, 6])
    assert (request.most, request.likeliest) == (16, 0)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 400, "not JSON"),
        (b"{", 400, "not JSON"),
        (b"\xff\xfe", 400, "not JSON"),
        (b"[" * 100_000, 400, "not JSON"),
        (b"[]", 400, "not a JSON object"),
        (chat(model="gpt-4"), 404, "'gpt-4'"),
        (chat(messages=[]), 400, "messages is missing"),
        (chat(messages="hello"), 400, "not an array"),
        (chat(messages=["hello"]), 400, "messages.0. is not an object"),
        (chat(messages=[{"role": 3}]), 400, "messages.0. is not an object"),
        (chat(messages=[{"role": "user", "content": 3}]), 400, "neither a text"),
        (chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), 400, "not text"),
        (chat(max_tokens=0), 400, "max_tokens is 0"),
        (chat(max_tokens=1.5), 400, "max_tokens is 1.5"),
        (chat(max_tokens=True), 400, "max_tokens is true"),
        (chat(temperature=-1), 400, "temperature is -1"),
        (chat(temperature="hot"), 400, 'temperature is "hot"'),
        (b'{"messages": [{"role": "user"}], "temperature": NaN}', 400, "temperature is NaN"),
        (chat(top_p=2), 400, "top_p is 2"),
        (chat(top_k=-1), 400, "top_k is -1"),
        (chat(seed="x"), 400, "seed"),
        (chat(stop=[""]), 400, "stop"),
        (chat(stop=list("abcde")), 400, "stop"),
        (chat(stop=3), 400, "stop"),
        (chat(stream="yes"), 400, "stream"),
        (chat(stream_options=3), 400, "stream_options"),
        (chat(top_logprobs=3), 400, "top_logprobs without logprobs"),
        (chat(logprobs=True, top_logprobs=21), 400, "top_logprobs is 21"),
        (chat(n=2), 400, "n is not supported"),
        (chat(response_format={"type": "json_object"}), 400, "response_format is not supported"),
        (chat(tool_choice="required"), 400, "tool_choice is not supported"),
        (chat(frequency_penalty=0.5), 400, "frequency_penalty is not supported"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(body: bytes, status: int, message: str) -> None:
    with pytest.raises(Refused, match=message) as refused:
        parsed(body, CHAT, "m")
    assert refused.value.status == status
    error = refused.value.body()["error"]
    assert error["message"] == refused.value.message
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("prompt", [None, 3, [], [[], []], ["a", "b"], [1.5], [-1], [True], [[5], [6]]])
def test_other_prompts_are_refused(prompt: object) -> None:
    with pytest.raises(Refused, match="prompt is not one text"):
        parsed(json.dumps({"prompt": prompt}).encode(), TEXT, "m")
