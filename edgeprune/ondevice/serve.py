"""serve.pyz: a bundle behind OpenAI's interface, by the standard library's server.

`python3 serve.pyz` in the bundle's folder does on the device what `edgeprune serve` does on a workstation, where only
the engine's modules, numpy and `tokenizers` are installed. This file runs on Python 3.10.
"""

from __future__ import annotations

import argparse
import hmac
import json
import queue
import select
import socket
import sys
import time
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NoReturn

from edgeprune.errors import EdgepruneError, EngineError, InputError
from edgeprune.files import read_text
from edgeprune.ondevice.answering import DONE, Event, ask, joined, line, metrics
from edgeprune.ondevice.bundle import CODEC, TOKENIZER, Chosen, open_to_run, rung_folder
from edgeprune.ondevice.bundle_runner import runners_of
from edgeprune.ondevice.figures import Workload
from edgeprune.ondevice.machine import resident_bytes
from edgeprune.ondevice.protocol import CHAT, MOST_BYTES, TEXT, Refused, Writing, models_of, parsed
from edgeprune.ondevice.serving import Service
from edgeprune.ondevice.words import DeviceTokenizer, TokenizerWords
from edgeprune.ondevice.worker import OnProgress

KINDS = {"/v1/chat/completions": CHAT, "/v1/completions": TEXT}
IDLE = 60.0  # seconds that a client may take to send its request
LISTENING = "listening"  # the progress of a server that was started over ssh
LOOK_SECONDS = 0.2  # between two looks at whether the client is still there


class Handler(BaseHTTPRequestHandler):
    """The requests of one connection."""

    protocol_version = "HTTP/1.1"
    timeout = IDLE
    server: Server

    def do_GET(self) -> None:
        """Answers /health, /metrics and /v1/models."""
        try:
            if self.path == "/health":
                self._send(200, {"status": "ok"})
            elif self.path == "/metrics":
                text = metrics(self.server.service, resident_bytes())
                self._send_bytes(200, text.encode(), "text/plain; version=0.0.4")
            elif self.path == "/v1/models":
                self._check_key()
                self._send(200, models_of(self.server.served, self.server.began))
            else:
                raise self._unknown(405 if self.path in KINDS else 404)
        except Refused as refused:
            self._refuse(refused)

    def do_POST(self) -> None:
        """Answers completions of chats and texts."""
        try:
            body = self._body()
            if self.path not in KINDS:
                raise self._unknown(404)
            self._check_key()
            asked = parsed(body, KINDS[self.path], self.server.served)
            events: queue.SimpleQueue[Event] = queue.SimpleQueue()
            job = ask(self.server.service, self.server.words, asked, events.put)
            writing = Writing(asked, self.server.served)
            try:
                if asked.stream:
                    self._stream(writing, events)
                else:
                    self._send(200, self._whole(writing, events))
            finally:
                job.cancelled = True
        except Refused as refused:
            self._refuse(refused)
        except OSError:  # the client has gone
            self.close_connection = True

    def log_message(self, form: str, *args: Any) -> None:
        """Writes nothing: prompts are nobody's business."""

    def _body(self) -> bytes:
        """Returns the body. Raises Refused for one that is too long, or has no length."""
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdecimal():
            self.close_connection = True
            raise Refused(411, "the request has no Content-Length")
        if int(length) > MOST_BYTES:
            self.close_connection = True
            raise Refused(413, f"the body is longer than {MOST_BYTES >> 20} MiB")
        return self.rfile.read(int(length))

    def _check_key(self) -> None:
        """Raises Refused for a request without the key."""
        check_key(self.headers.get("Authorization", ""), self.server.key)

    def _unknown(self, status: int) -> Refused:
        return Refused(status, f"{self.command} {self.path.partition('?')[0]} is not served here")

    def _refuse(self, refused: Refused) -> None:
        self._send(refused.status, refused.body(), refused.headers)

    def _send(self, status: int, document: Mapping[str, Any], headers: Mapping[str, str] = {}) -> None:
        self._send_bytes(status, json.dumps(document, ensure_ascii=False).encode(), "application/json", headers)

    def _send_bytes(self, status: int, content: bytes, kind: str, headers: Mapping[str, str] = {}) -> None:
        self.send_response(status)
        fields = {"Content-Type": kind, "Content-Length": str(len(content)), **headers}
        for name, value in (fields | ({"Connection": "close"} if self.close_connection else {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def _stream(self, writing: Writing, events: queue.SimpleQueue[Event]) -> None:
        """Sends an answer piece by piece; its end is that of the connection. Raises OSError where the client has
        gone."""
        self.close_connection = True
        self.send_response(200)
        for name, value in (
            ("Content-Type", "text/event-stream"),
            ("Cache-Control", "no-cache"),
            ("Connection", "close"),
        ):
            self.send_header(name, value)
        self.end_headers()
        for document in writing.first():
            self.wfile.write(line(document).encode())
        while True:
            event = events.get()
            if event.error is not None:
                self.wfile.write(line(event.error.body()).encode())
                return
            self.wfile.write(line(writing.piece(event.text, event.logprobs, event.reason)).encode())
            self.wfile.flush()
            if event.reason is not None:
                for document in writing.last(event.usage):
                    self.wfile.write(line(document).encode())
                self.wfile.write(DONE.encode())
                return

    def _whole(self, writing: Writing, events: queue.SimpleQueue[Event]) -> dict[str, Any]:
        """Returns an answer in one document. Raises Refused, and ConnectionError where the client has gone."""
        pieces: list[Event] = []
        while not pieces or pieces[-1].reason is None:
            try:
                event = events.get(timeout=LOOK_SECONDS)
            except queue.Empty:
                self._check_client()
                continue
            if event.error is not None:
                raise event.error
            pieces.append(event)
        return joined(writing, pieces)

    def _check_client(self) -> None:
        """Raises ConnectionError where the client has closed the connection."""
        readable, _, _ = select.select([self.connection], [], [], 0)
        if readable and not self.connection.recv(1, socket.MSG_PEEK):
            raise ConnectionError


def check_key(header: str, key: str | None) -> None:
    """Raises Refused where an Authorization header does not bring the key; None: none is asked for."""
    if key is None:
        return
    kind, _, given = header.partition(" ")
    if kind.lower() != "bearer" or not hmac.compare_digest(given.encode("utf-8", "replace"), key.encode()):
        raise Refused(401, "the API key is missing or wrong", code="invalid_api_key")


class Server(ThreadingHTTPServer):
    """A server of one service."""

    daemon_threads = True

    def __init__(
        self, address: tuple[str, int], service: Service, words: TokenizerWords, served: str, key: str | None
    ) -> None:
        super().__init__(address, Handler)
        self.service, self.words, self.served, self.key, self.began = service, words, served, key, int(time.time())


def key_of(path: Path | None) -> str | None:
    """Returns the key in a file. Raises InputError where it is empty or cannot be read."""
    if path is None:
        return None
    key = read_text(path, "Give a file with the key in one line.").strip()
    if not key or not key.isascii() or len(key.split()) != 1:
        raise InputError(
            f"{path} holds no key: one line of ASCII without spaces", "Write one, such as `openssl rand -hex 32`."
        )
    return key


def open_to_serve(bundle: Path) -> Chosen:
    """Returns the chosen rung of a bundle whose tokenizer is whole. Raises InputError where it answers no text."""
    chosen = open_to_run(bundle)
    if (bundle / CODEC).is_dir():
        raise InputError(
            f"{bundle} is the bundle of an image generator, which answers no text", "Draw with `edgeprune run`."
        )
    chosen.check(chosen.tokenizer)
    return chosen


def serving_line(name: str, address: str, slots: int) -> str:
    """Returns what a server says when it is ready; address: without the path of the interface."""
    at_once = "1 request" if slots == 1 else f"{slots} requests"
    return f"Serving {name} at {address}/v1, {at_once} at a time. Ctrl-C ends it."


def serve_chosen(
    chosen: Chosen,
    name: str,
    place: tuple[str, int],
    slots: int | None,
    waiting: int,
    key: str | None,
    draft: Path | None,
    note: Callable[[str], None],
    on_ready: Callable[[int, int], None],
) -> None:
    """Serves a rung until this process is ended.

    name: the model's; place: host and port, 0: any that is free; slots: requests that are answered at once, None: the
    batch that the bundle was fitted for; waiting: more that may wait; key: that requests must bring. note, draft: as of
    runners_of; on_ready is called with the port and the slots. Raises InputError where the tokenizer cannot be read or
    the port is taken, and what the engine raises.
    """
    tokenizer = DeviceTokenizer(chosen.tokenizer)
    with Service(lambda: runners_of(chosen, slots, note, draft), waiting) as service:
        words = TokenizerWords(tokenizer, tokenizer.ends, service.vocab_size)
        try:
            server = Server(place, service, words, name, key)
        except (OSError, OverflowError) as error:
            raise InputError(f"cannot listen at {place[0]}:{place[1]}: {error}", "Try another --port.") from None
        with server:
            on_ready(server.server_address[1], len(service.slots))
            server.serve_forever()


def answer(request: Mapping[str, Any], on_progress: OnProgress) -> NoReturn:
    """Serves files that came over ssh at any free port of the loopback, until the workstation goes.

    request: `files` by role, of which those of the tokenizer begin with TOKENIZER, `engine`, `workload`, `name`,
    `slots`, `waiting` and `key`. The progress tells what runners_of notes, and then LISTENING with port and slots.
    """
    files = {role: Path(path) for role, path in request["files"].items()}
    folder = next(path for path in files.values()).parents[len(rung_folder(Path(), 0).parts) + 1]
    tokenizer = folder / TOKENIZER
    tokenizer.mkdir(exist_ok=True)
    for role, path in files.items():
        if role.startswith(TOKENIZER):
            path.replace(tokenizer / path.name)
    chosen = Chosen(folder, {"sha256": {}}, 0, request["engine"], Workload(**request["workload"]))
    serve_chosen(
        chosen,
        request["name"],
        ("127.0.0.1", 0),
        request["slots"],
        request["waiting"],
        request["key"],
        None,
        lambda text: on_progress(text, 0, 0),
        lambda port, slots: on_progress(LISTENING, port, slots),
    )
    raise EngineError("the server ended", "Try again.")


def main() -> int:
    """Runs serve.pyz. Returns 0 where a signal ended it, 2 for bad input, 4 for a failure of the engine."""
    parser = argparse.ArgumentParser(prog="serve.pyz", description=__doc__.splitlines()[0])
    parser.add_argument("bundle", nargs="?", type=Path, help="default: the folder that serve.pyz is in")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen at (%(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="the port (%(default)s); 0: any that is free")
    parser.add_argument(
        "--slots", type=int, help="requests that are answered at once, by steps of all; default: the bundle's batch"
    )
    parser.add_argument("--queue", type=int, default=32, help="more requests that may wait (%(default)s)")
    parser.add_argument("--draft", type=Path, help="the bundle of a draft, which guesses tokens ahead")
    parser.add_argument("--api-key-file", type=Path, help="a file with the key that requests must bring")
    options = parser.parse_args()

    def note(text: str) -> None:
        sys.stderr.write(f"{text}\n")

    def ready(port: int, slots: int) -> None:
        sys.stdout.write(f"{serving_line(name, f'http://{options.host}:{port}', slots)}\n")
        sys.stdout.flush()

    try:
        bundle = options.bundle or Path(sys.argv[0]).resolve().parent
        name, key = bundle.resolve().name, key_of(options.api_key_file)
        place = options.host, options.port
        serve_chosen(open_to_serve(bundle), name, place, options.slots, options.queue, key, options.draft, note, ready)
    except EdgepruneError as error:
        note(f"error: {error.message}\n{error.remedy}")
        return error.exit_code
    except KeyboardInterrupt:
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
