"""The HTTP server of a bundle: OpenAI's chat and text completions on Starlette, and a tokenizer as it needs one.

It knows no engine: ondevice/serving.py runs it, ondevice/protocol.py reads and writes the bodies.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import time
import weakref
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.errors import InputError
from edgeprune.model.tokens.chat import check_ids, encode, render_whole
from edgeprune.model.tokens.generation import end_ids
from edgeprune.model.tokens.tokenizer import load_tokenizer
from edgeprune.ondevice.answering import Event, ask, metrics
from edgeprune.ondevice.machine import resident_bytes
from edgeprune.ondevice.protocol import CHAT, TEXT, Refused, Writing, models_of, parsed
from edgeprune.ondevice.serving import Job, Service

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

MOST_BYTES = 4 << 20  # of a request's body
DONE = "data: [DONE]\n\n"


class BundleWords:
    """The tokenizer of a bundle, with its chat template, as answering.Words."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = load_tokenizer(folder), vocab_size
        self.ends = frozenset(end_ids(self._tokenizer, folder))

    def chat_ids(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any]) -> list[int]:
        """Returns the token ids of a chat with the opening of an answer. Raises InputError where there is no template
        or it refuses the chat."""
        if self._tokenizer.chat_template is None:
            raise InputError("the model has no chat template", "Ask for /v1/completions instead.")
        text = render_whole(self._tokenizer, messages, tools, prompted=True)
        ids = encode(self._tokenizer, text, special=False)
        check_ids([ids], self._vocab_size, self._tokenizer, "the chat")
        return ids

    def ids(self, text: str) -> list[int]:
        """Returns the token ids of a text. Raises InputError."""
        ids = encode(self._tokenizer, text)
        check_ids([ids], self._vocab_size, self._tokenizer, "the prompt")
        return ids

    def text(self, ids: Sequence[int]) -> str:
        """Returns the text of token ids, without special tokens."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)


def app_of(service: Service, words: BundleWords, served: str, key: str | None) -> Starlette:
    """Returns the application. served: the model's name; key: that requests must bring, None for none."""
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse, PlainTextResponse
    from starlette.routing import Route

    began = int(time.time())

    def refusal(refused: Refused) -> Response:
        return JSONResponse(refused.body(), refused.status, refused.headers)

    def check_key(request: Request) -> None:
        """Raises Refused for a request without the key."""
        if key is None:
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(given.encode(), key.encode()):
            raise Refused(401, "the API key is missing or wrong", code="invalid_api_key")

    async def complete(request: Request, kind: str) -> Response:
        from starlette.concurrency import run_in_threadpool

        try:
            check_key(request)
            asked = parsed(await _body(request), kind, served)
            events: asyncio.Queue[Event] = asyncio.Queue()
            loop = asyncio.get_running_loop()

            def put(event: Event) -> None:
                loop.call_soon_threadsafe(events.put_nowait, event)

            job = await run_in_threadpool(ask, service, words, asked, put)
            writing = Writing(asked, served)
            if asked.stream:
                return _event_stream(writing, events, job)
            return await _whole(request, writing, events, job)
        except Refused as refused:
            return refusal(refused)

    async def chat(request: Request) -> Response:
        return await complete(request, CHAT)

    async def text(request: Request) -> Response:
        return await complete(request, TEXT)

    async def models(request: Request) -> Response:
        try:
            check_key(request)
        except Refused as refused:
            return refusal(refused)
        return JSONResponse(models_of(served, began))

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def shown_metrics(request: Request) -> Response:
        return PlainTextResponse(metrics(service, resident_bytes()), media_type="text/plain; version=0.0.4")

    async def unknown(request: Request, error: Exception) -> Response:
        status = getattr(error, "status_code", 404)
        message = f"{request.method} {request.url.path} is not served here"
        return JSONResponse(Refused(status, message).body(), status)

    return Starlette(
        routes=[
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/completions", text, methods=["POST"]),
            Route("/v1/models", models),
            Route("/health", health),
            Route("/metrics", shown_metrics),
        ],
        exception_handlers={404: unknown, 405: unknown},
    )


async def _body(request: Request) -> bytes:
    """Returns the body of a request. Raises Refused where it is too long."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > MOST_BYTES:
            raise Refused(413, f"the body is longer than {MOST_BYTES >> 20} MiB")
        parts.append(part)
    return b"".join(parts)


def _event_stream(writing: Writing, events: asyncio.Queue[Event], job: Job) -> Response:
    """Returns the response that streams an answer; a client that goes away ends the job."""
    from starlette.responses import StreamingResponse

    async def lines() -> AsyncIterator[str]:
        try:
            for document in writing.first():
                yield _line(document)
            while True:
                event = await events.get()
                if event.error is not None:
                    yield _line(event.error.body())
                    return
                yield _line(writing.piece(event.text, event.logprobs, event.reason))
                if event.reason is not None:
                    for document in writing.last(event.usage):
                        yield _line(document)
                    yield DONE
                    return
        finally:
            job.cancelled = True

    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    response = StreamingResponse(lines(), media_type="text/event-stream", headers=headers)
    weakref.finalize(response, setattr, job, "cancelled", True)  # a client may go before the first line
    return response


def _line(document: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(document, ensure_ascii=False)}\n\n"


async def _whole(request: Request, writing: Writing, events: asyncio.Queue[Event], job: Job) -> Response:
    """Returns an answer in one document; a client that goes away ends the job. Raises Refused."""
    from starlette.responses import JSONResponse, Response

    gone = asyncio.ensure_future(_gone(request))
    pieces: list[Event] = []
    try:
        while not pieces or pieces[-1].reason is None:
            coming = asyncio.ensure_future(events.get())
            await asyncio.wait({coming, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not coming.done():
                coming.cancel()
                return Response(status_code=499)  # nobody reads it
            event = coming.result()
            if event.error is not None:
                raise event.error
            pieces.append(event)
    finally:
        gone.cancel()
        job.cancelled = True
    logprobs = [one for piece in pieces for one in piece.logprobs]
    end = pieces[-1]
    return JSONResponse(writing.whole("".join(piece.text for piece in pieces), logprobs, end.reason, end.usage))


async def _gone(request: Request) -> None:
    """Returns when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
