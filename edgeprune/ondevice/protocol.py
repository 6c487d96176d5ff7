"""The bodies of OpenAI's chat and text completions: requests are checked, answers are written.

This file also runs on the device: Python 3.10, standard library only. It knows no tokenizer, engine or server. What a
request asks for that the service does not do is refused by name; what only describes the client is left alone.
"""

from __future__ import annotations

import json
import random
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgeprune.ondevice.sampling import Drawing

MOST_BYTES = 4 << 20  # of a request's body
MOST_STOPS, MOST_LIKELIEST = 4, 20
CHAT, TEXT = "chat", "text"
UNDONE: dict[str, tuple[Any, ...]] = {
    # fields of features that the service has not, and the values with which they ask for nothing
    "n": (None, 1),
    "best_of": (None, 1),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "echo": (None, False),
    "suffix": (None, ""),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "tool_choice": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "audio": (None,),
    "modalities": (None, ["text"]),
}


class Refused(Exception):
    """A request that is answered by an error: an HTTP status, a message, the field, a code, and when to ask again."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, seconds: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.seconds = status, message, param, code, seconds

    @property
    def headers(self) -> dict[str, str]:
        """Returns the headers of the answer."""
        return {} if self.seconds is None else {"Retry-After": str(self.seconds)}

    def body(self) -> dict[str, Any]:
        """Returns the error as OpenAI writes it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Request:
    """A checked request. prompt: a text or token ids, of a text completion; messages, tools: of a chat.

    most: new tokens, None for as many as fit; stop: texts that end the answer; likeliest: as of serving.Job.
    """

    kind: str
    prompt: str | list[int] | None
    messages: list[dict[str, Any]]
    tools: list[Any]
    stream: bool
    with_usage: bool
    most: int | None
    drawing: Drawing
    stop: tuple[str, ...]
    likeliest: int | None


def parsed(body: bytes, kind: str, served: str) -> Request:
    """Returns the request of a body. served: the name of the model. Raises Refused."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise Refused(400, "the body is not a JSON object")
    model = fields.get("model", served)
    if model != served:
        raise Refused(
            404, f"there is no model {model!r} here; the one that is served is {served!r}", "model", "model_not_found"
        )
    for name, nothing in UNDONE.items():
        if fields.get(name) not in nothing:
            raise Refused(400, f"{name} is not supported by this server", name, "unsupported_parameter")
    stream = _flag(fields, "stream")
    options = _field(fields, "stream_options", dict, {})
    likeliest = _likeliest(fields, kind)
    most = _number(fields, "max_completion_tokens" if "max_completion_tokens" in fields else "max_tokens", int, None, 1)
    if kind == TEXT and most is None:
        most = 16  # OpenAI's default
    seed = _number(fields, "seed", int, None, -(2**63), 2**63)
    drawing = Drawing(
        temperature=_number(fields, "temperature", float, 1.0, 0, 2),
        top_p=_number(fields, "top_p", float, 1.0, 0, 1),
        top_k=_number(fields, "top_k", int, 0, 0),
        seed=random.getrandbits(63) if seed is None else seed % 2**63,
    )
    return Request(
        kind,
        _prompt(fields) if kind == TEXT else None,
        _messages(fields) if kind == CHAT else [],
        _field(fields, "tools", list, []) if kind == CHAT else [],
        stream,
        stream and _flag(options, "include_usage"),
        most,
        drawing,
        _stops(fields),
        likeliest,
    )


def _field(fields: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    value = fields.get(name)
    if value is None:
        return default
    if not isinstance(value, kind):
        raise Refused(400, f"{name} is {json.dumps(value)[:100]}, not {_NAMES[kind]}", name)
    return value


_NAMES = {
    dict: "an object",
    list: "an array",
    bool: "true or false",
    str: "a text",
    int: "a whole number",
    float: "a number",
}


def _flag(fields: Mapping[str, Any], name: str) -> bool:
    return _field(fields, name, bool, False)


def _number(
    fields: Mapping[str, Any], name: str, kind: type, default: Any, least: float, most: float = float("inf")
) -> Any:
    """Returns a number within its bounds. Raises Refused."""
    value = fields.get(name)
    if value is None:
        return default
    is_number = isinstance(value, (int, kind)) and not isinstance(value, bool)
    if not is_number or not least <= value <= most:
        bounds = f"from {least:g}" + (f" to {most:g}" if most < float("inf") else "")
        raise Refused(400, f"{name} is {json.dumps(value)[:100]}, not {_NAMES[kind]} {bounds}", name)
    return value


def _likeliest(fields: Mapping[str, Any], kind: str) -> int | None:
    """Returns of how many tokens log probabilities are asked for; None: of none."""
    if kind == TEXT:
        return _number(fields, "logprobs", int, None, 0, MOST_LIKELIEST)
    count = _number(fields, "top_logprobs", int, 0, 0, MOST_LIKELIEST)
    if _flag(fields, "logprobs"):
        return count
    if count:
        raise Refused(400, "top_logprobs without logprobs", "top_logprobs")
    return None


def _stops(fields: Mapping[str, Any]) -> tuple[str, ...]:
    stop = fields.get("stop")
    texts = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(texts, list) or len(texts) > MOST_STOPS or not all(isinstance(one, str) and one for one in texts):
        raise Refused(400, f"stop is not a text or up to {MOST_STOPS} texts", "stop")
    return tuple(texts)


def _prompt(fields: Mapping[str, Any]) -> str | list[int]:
    """Returns the one prompt, as a text or as token ids. Raises Refused."""
    prompt = fields.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]
    is_ids = isinstance(prompt, list) and prompt and all(type(one) is int and one >= 0 for one in prompt)
    if not is_ids and not isinstance(prompt, str):
        raise Refused(400, "prompt is not one text, or one array of token ids", "prompt")
    return prompt


def _messages(fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the messages, with the text parts of a content joined. Raises Refused."""
    messages = _field(fields, "messages", list, [])
    if not messages:
        raise Refused(400, "messages is missing or empty", "messages")
    plain = []
    for index, message in enumerate(messages):
        place = f"messages[{index}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise Refused(400, f"{place} is not an object with a role", "messages")
        content = message.get("content")
        if isinstance(content, list):
            parts = [
                part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
            ]
            if not all(isinstance(part, str) for part in parts):
                raise Refused(400, f"{place} has content that is not text: this server reads text alone", "messages")
            content = "".join(parts)
        if content is not None and not isinstance(content, str):
            raise Refused(400, f"{place} has a content that is neither a text nor text parts", "messages")
        plain.append({**message, "content": content})
    return plain


@dataclass
class Writing:
    """The documents of one answer. usage: what it took, once it has ended."""

    request: Request
    model: str
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.id = f"{'chatcmpl' if self.request.kind == CHAT else 'cmpl'}-{uuid.uuid4().hex}"

    def whole(
        self, text: str, logprobs: Sequence[Mapping[str, Any]], reason: str, usage: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Returns the document of an answer that is not streamed."""
        choice: dict[str, Any] = {"index": 0, "finish_reason": reason, "logprobs": self._logprobs(logprobs)}
        if self.request.kind == CHAT:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        return self._document("", [choice]) | {"usage": dict(usage)}

    def first(self) -> list[dict[str, Any]]:
        """Returns what a stream begins with: of a chat the role."""
        if self.request.kind != CHAT:
            return []
        choice = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        return [self._document(".chunk", [choice]) | self._no_usage()]

    def piece(self, text: str, logprobs: Sequence[Mapping[str, Any]], reason: str | None = None) -> dict[str, Any]:
        """Returns a piece of a stream; reason: of its end."""
        choice: dict[str, Any] = {"index": 0, "logprobs": self._logprobs(logprobs), "finish_reason": reason}
        if self.request.kind == CHAT:
            choice["delta"] = {"content": text} if text or reason is None else {}
        else:
            choice["text"] = text
        return self._document(".chunk", [choice]) | self._no_usage()

    def last(self, usage: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Returns what a stream ends with: where the request asks for it, what it took."""
        return [self._document(".chunk", []) | {"usage": dict(usage)}] if self.request.with_usage else []

    def _no_usage(self) -> dict[str, Any]:
        return {"usage": None} if self.request.with_usage else {}

    def _document(self, part: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = f"chat.completion{part}" if self.request.kind == CHAT else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def _logprobs(self, tokens: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
        """Returns log probabilities as the kind of completion has them."""
        if self.request.likeliest is None:
            return None
        if self.request.kind == CHAT:
            return {"content": list(tokens), "refusal": None}
        # Of tokens with one text, such as halves of characters, the likeliest stays.
        return {
            "tokens": [token["token"] for token in tokens],
            "token_logprobs": [token["logprob"] for token in tokens],
            "top_logprobs": [
                {one["token"]: one["logprob"] for one in reversed(token["top_logprobs"])} for token in tokens
            ],
            "text_offset": [token["offset"] for token in tokens],
        }


def usage_of(prompt: int, new: int, reused: int) -> dict[str, Any]:
    """Returns what an answer took, in tokens; reused: of the prompt, from the cache."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": reused},
    }


def models_of(served: str, created: int) -> dict[str, Any]:
    """Returns the document of the one model that is served."""
    return {"object": "list", "data": [{"id": served, "object": "model", "created": created, "owned_by": "edgeprune"}]}
