"""The HTTP server of a bundle: OpenAI's chat and text completions on Starlette, and the bundle's tokenizer.

It knows no engine: ondevice/serving.py runs it, ondevice/protocol.py reads and writes the bodies.
"""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune.model.tokens.generation import end_ids
from edgeprune.model.tokens.tokenizer import load_tokenizer
from edgeprune.ondevice.answering import DONE, Event, ask, joined, line, metrics
from edgeprune.ondevice.machine import resident_bytes
from edgeprune.ondevice.protocol import CHAT, MOST_BYTES, TEXT, Refused, Writing, models_of, parsed
from edgeprune.ondevice.serve import check_key
from edgeprune.ondevice.serving import Job, Service
from edgeprune.ondevice.words import TokenizerWords

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response


def words_of(folder: Path, vocab_size: int) -> TokenizerWords:
    """Returns the tokenizer in a bundle's folder as the service needs it. Raises InputError where it cannot be read."""
    tokenizer = load_tokenizer(folder)
    return TokenizerWords(tokenizer, end_ids(tokenizer, folder), vocab_size)


def app_of(service: Service, words: TokenizerWords, served: str, key: str | None) -> Starlette:
    """Returns the application. served: the model's name; key: that requests must bring, None for none."""
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse, PlainTextResponse
    from starlette.routing import Route

    began = int(time.time())

    def refusal(refused: Refused) -> Response:
        return JSONResponse(refused.body(), refused.status, refused.headers)

    async def complete(request: Request, kind: str) -> Response:
        from starlette.concurrency import run_in_threadpool

        try:
            check_key(request.headers.get("authorization", ""), key)
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
            check_key(request.headers.get("authorization", ""), key)
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
                yield line(document)
            while True:
                event = await events.get()
                if event.error is not None:
                    yield line(event.error.body())
                    return
                yield line(writing.piece(event.text, event.logprobs, event.reason))
                if event.reason is not None:
                    for document in writing.last(event.usage):
                        yield line(document)
                    yield DONE
                    return
        finally:
            job.cancelled = True

    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    response = StreamingResponse(lines(), media_type="text/event-stream", headers=headers)
    weakref.finalize(response, setattr, job, "cancelled", True)  # a client may go before the first line
    return response


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
    return JSONResponse(joined(writing, pieces))


async def _gone(request: Request) -> None:
    """Returns when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
