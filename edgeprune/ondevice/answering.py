"""Answers in text: a request becomes token ids, and drawn tokens become pieces of text, up to what ends them.

This file also runs on the device: Python 3.10 and numpy. It knows no server: what it makes goes to a function.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from edgeprune.errors import EdgepruneError
from edgeprune.ondevice.protocol import CHAT, Refused, Request, Writing, usage_of
from edgeprune.ondevice.serving import Busy, Job, Service, Token

DONE = "data: [DONE]\n\n"  # the last line of a stream
HALF = "\ufffd"  # what a tokenizer writes for a part of a character


class Words(Protocol):
    """A tokenizer as the service needs it. ends: ids that end an answer."""

    ends: frozenset[int]

    def chat_ids(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any]) -> list[int]: ...
    def ids(self, text: str) -> list[int]: ...
    def text(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True)
class Event:
    """A piece of an answer, or its end. logprobs: of the tokens of the piece, as a chat's; reason: of the end; usage:
    what the answer took; error: what ended it instead."""

    text: str = ""
    logprobs: tuple[dict[str, Any], ...] = ()
    reason: str | None = None
    usage: Mapping[str, Any] | None = None
    error: Refused | None = None


@dataclass
class _Answer:
    """The text of an answer while its tokens come. shown: characters that were handed out."""

    words: Words
    stop: tuple[str, ...]
    put: Callable[[Event], None]
    ids: list[int] = field(default_factory=list)
    shown: int = 0
    waiting: list[dict[str, Any]] = field(default_factory=list)

    def add(self, token: Token, with_logprobs: bool) -> bool:
        """Takes a token; returns whether no stop text has come."""
        before = self.words.text(self.ids)
        self.ids.append(token.id)
        text = self.words.text(self.ids)
        if with_logprobs:
            self.waiting.append(self._logprobs(token, len(before)))
        places = [place for one in self.stop if (place := text.find(one, max(0, self.shown - len(one)))) >= 0]
        if places:
            self._show(text[: min(places)])
            return False
        # Half a character, and what may become a stop text, are still to come.
        if not text.endswith(HALF):
            self._show(text[: len(text) - self._begun(text)])
        return True

    def finish(self, job: Job, how: str) -> None:
        """Hands out what was held back, and the end."""
        text = self.words.text(self.ids)
        places = [place for one in self.stop if (place := text.find(one)) >= 0]
        rest = text[self.shown : min(places)] if places else text[self.shown :]
        usage = usage_of(len(job.prompt), job.drawn, job.reused)
        self.put(Event(rest, tuple(self.waiting), how, usage))

    def _show(self, text: str) -> None:
        if len(text) > self.shown:
            self.put(Event(text[self.shown :], tuple(self.waiting)))
            self.shown = len(text)
            self.waiting = []

    def _begun(self, text: str) -> int:
        """Returns how many characters at the end begin a stop text."""
        return max((size for one in self.stop for size in range(1, len(one)) if text.endswith(one[:size])), default=0)

    def _logprobs(self, token: Token, offset: int) -> dict[str, Any]:
        """Returns a token's log probabilities as a chat's, with its place in the text."""

        def entry(number: int, logprob: float) -> dict[str, Any]:
            text = self.words.text([number])
            whole = None if HALF in text else list(text.encode())
            return {"token": text, "logprob": logprob, "bytes": whole}

        best = [entry(*one) for one in token.likeliest]
        return entry(token.id, token.logprob) | {"top_logprobs": best, "offset": offset}


def ask(service: Service, words: Words, request: Request, put: Callable[[Event], None]) -> Job:
    """Queues a request, whose events go to `put` in the engine's thread, the last one with a reason or an error.

    Raises Refused where its prompt cannot be read or has no room, or where the service is busy.
    """
    # The prompt as token ids, with room for an answer.
    param = "messages" if request.kind == CHAT else "prompt"
    try:
        if request.kind == CHAT:
            ids = words.chat_ids(request.messages, request.tools)
        else:
            ids = words.ids(request.prompt) if isinstance(request.prompt, str) else request.prompt
    except EdgepruneError as error:
        raise Refused(
            400, f"{error.message}. {error.remedy}", "messages" if request.kind == CHAT else "prompt"
        ) from None
    param = "messages" if request.kind == CHAT else "prompt"
    if not ids:
        raise Refused(400, "the prompt is empty", param)
    if beyond := [one for one in ids if one >= service.vocab_size]:
        raise Refused(
            400, f"the prompt holds the token {beyond[0]}, beyond the {service.vocab_size} of the model", param
        )
    room = service.capacity + 1 - len(ids)
    if room < 1 or (request.most or 1) > room:
        wanted = f" and {request.most} new ones" if request.most else ""
        raise Refused(
            400,
            f"the prompt of {len(ids)} tokens{wanted} exceeds the context of {service.capacity}",
            param,
            "context_length_exceeded",
        )
    # The job, whose tokens become text as they come.
    answer = _Answer(words, request.stop, put)

    def on_end(how: str | Exception) -> None:
        if isinstance(how, EdgepruneError):
            put(Event(error=Refused(500, f"{how.message}. {how.remedy}")))
        elif isinstance(how, Exception):
            put(Event(error=Refused(500, "the request failed; the server's log has the reason")))
        else:
            answer.finish(job, how)

    with_logprobs = request.likeliest is not None
    most = min(request.most or room, room)
    job = Job(
        ids,
        most,
        request.drawing,
        words.ends,
        lambda token: answer.add(token, with_logprobs),
        on_end,
        request.likeliest,
    )
    try:
        service.submit(job)
    except Busy as busy:
        message = "the server is busy: all slots are taken and the queue is full"
        raise Refused(429, message, code="rate_limit_exceeded", seconds=busy.seconds) from None
    return job


def joined(writing: Writing, pieces: Sequence[Event]) -> dict[str, Any]:
    """Returns the document of an answer that is not streamed, from its pieces, the last one with a reason."""
    logprobs = [one for piece in pieces for one in piece.logprobs]
    end = pieces[-1]
    return writing.whole("".join(piece.text for piece in pieces), logprobs, end.reason, end.usage)


def line(document: Mapping[str, Any]) -> str:
    """Returns a document as an event of a stream."""
    return f"data: {json.dumps(document, ensure_ascii=False)}\n\n"


def metrics(service: Service, resident: int | None) -> str:
    """Returns what the service does and did, in the text format of Prometheus. resident: bytes of the process."""
    counts = service.counts
    named = [
        ("requests_ended_total", "counter", "answers that were complete", counts.ended),
        ("requests_failed_total", "counter", "answers that an error ended", counts.failed),
        ("requests_cancelled_total", "counter", "requests whose client went away", counts.cancelled),
        ("requests_refused_total", "counter", "requests that the full queue refused", counts.refused),
        ("requests_active", "gauge", "requests that are being answered", service.active),
        ("requests_waiting", "gauge", "requests in the queue", service.waiting),
        ("slots", "gauge", "requests that are answered at once", len(service.slots)),
        ("prompt_tokens_total", "counter", "tokens of prompts", counts.prompt_tokens),
        ("prompt_tokens_reused_total", "counter", "tokens of prompts that a cache held already", counts.reused_tokens),
        ("new_tokens_total", "counter", "tokens that were drawn", counts.new_tokens),
    ]
    if (guesses := service.guesses) is not None:
        named += [
            ("draft_tokens_total", "counter", "tokens that the draft guessed", guesses[0]),
            ("draft_tokens_accepted_total", "counter", "guessed tokens that were drawn", guesses[1]),
        ]
    lines = []
    for name, kind, what, value in named:
        lines += [f"# HELP edgeprune_{name} {what}", f"# TYPE edgeprune_{name} {kind}", f"edgeprune_{name} {value}"]
    for name, what, total, number in (
        (
            "time_to_first_token_seconds",
            "from a request to its first token",
            counts.first_token_seconds,
            counts.first_tokens,
        ),
        ("time_per_output_token_seconds", "between tokens of an answer", counts.token_seconds, counts.later_tokens),
    ):
        lines += [f"# HELP edgeprune_{name} {what}", f"# TYPE edgeprune_{name} summary"]
        lines += [f"edgeprune_{name}_sum {total:.6f}", f"edgeprune_{name}_count {number}"]
    if resident is not None:
        lines += ["# HELP process_resident_memory_bytes resident memory", "# TYPE process_resident_memory_bytes gauge"]
        lines.append(f"process_resident_memory_bytes {resident}")
    return "\n".join(lines) + "\n"
