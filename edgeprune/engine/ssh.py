"""One ssh connection to a device: its address, the messages in both directions, and the meaning of its end.

It does not know the tasks that run there. It is the system's ssh with the user's config, keys and known_hosts. It
never asks the user anything, and it checks the host's key.
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from edgeprune.engine.answers import REMEDY, AnyMessage, Done, Go, Hello, Refusal, Step, read_message
from edgeprune.engine.pipes import Incoming, Late, Outgoing
from edgeprune.errors import BadAnswer, EngineError, InputError, Unreachable
from edgeprune.ondevice.agent import CHUNK, PROTOCOL
from edgeprune.ondevice.durations import timing
from edgeprune.ondevice.lines import MOST_LINE, document_of, one_line
from edgeprune.ondevice.worker import OnProgress

CONNECT_SECONDS = 20
_LAST_OPTION = "ServerAliveCountMax=4"
# Reads a program, whose length is in the first line, and runs it; every shell understands the command alike.
COMMAND = "python3 -c 'import sys; exec(sys.stdin.buffer.read(int(sys.stdin.buffer.readline())))'"
_COMPLAINTS = (
    (
        "remote host identification has changed",
        "its host key is not the known one",
        "If the device was set up anew, remove the old key with ssh-keygen -R and connect once by hand: {ssh}",
    ),
    (
        "host key verification failed",
        "its host key is not known yet",
        "Connect once by hand and compare the key: {ssh}",
    ),
    (
        "permission denied",
        "it does not let this user in",
        "Install your key there (ssh-copy-id), or load it into ssh-agent; check with: {ssh}",
    ),
    (
        "too many authentication failures",
        "it does not let this user in",
        "Name the key for it in ~/.ssh/config (IdentityFile, IdentitiesOnly yes); check with: {ssh}",
    ),
    ("could not resolve", "its name is not known", "Check the name, or give its address."),
    ("connection refused", "it refuses the connection", "Check the port, and that sshd runs there."),
    ("timed out", "it does not answer", "Check that the device is on, and the network."),
    ("no route to host", "it cannot be reached", "Check that the device is on, and the network."),
    ("network is unreachable", "it cannot be reached", "Check the network."),
)
BANNER_LINES, BANNER_BYTES = 1000, 1 << 16  # that a login shell may print before the agent begins, and in each of them
SLOWEST_DISK, SLOWEST_NETWORK = 1e6, 1e4  # bytes a second
ALIVE = {"alive": True}
_SILENT = "Check the device and its load, and try again; a fit goes on with --resume."
_USER = r"[A-Za-z0-9_.][A-Za-z0-9_.\-]*"
_HOST = r"[A-Za-z0-9_.][A-Za-z0-9_.\-]*"
_ADDRESS = r"[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*(?:%[A-Za-z0-9_.\-]+)?"  # IPv6, perhaps with a zone
_TARGET = re.compile(rf"ssh://(?:({_USER})@)?(?:({_HOST})|\[({_ADDRESS})\])(?::([0-9]{{1,5}}))?/?")


@dataclass(frozen=True)
class Target:
    """A device by its ssh address."""

    user: str | None
    host: str
    port: int | None

    @staticmethod
    def parse(text: str) -> Target:
        """Returns the target of `ssh://[user@]host[:port]`.

        Raises InputError for anything else, and so for all that ssh could take for an option.
        """
        remedy = "Write ssh://user@host or ssh://user@host:port, and use a key: ssh cannot ask for a password here."
        if re.match(r"(?s)ssh://[^@]*:.*@", text):
            raise InputError("the target holds a password, which other users of this machine could read", remedy)
        match = _TARGET.fullmatch(text)
        if match is None and _TARGET.fullmatch(f"ssh://{text}"):
            raise InputError(
                f"malformed target {text!r}: it does not begin with ssh://", f"Write --target ssh://{text}"
            )
        if match is None:
            raise InputError(f"malformed target {text!r}", remedy)
        user, name, address, port = match.groups()
        if port is not None and not 0 < int(port) < 2**16:
            raise InputError(f"malformed target {text!r}: the port is not a number from 1 to 65535", remedy)
        return Target(user, name or address, None if port is None else int(port))

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"ssh://{self.user + '@' if self.user else ''}{host}{f':{self.port}' if self.port else ''}"

    def words(self) -> list[str]:
        """Returns the ssh command line up to the host."""
        words = ["ssh", "-T", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}"]
        words += ["-o", "ServerAliveInterval=15", "-o", _LAST_OPTION]
        words += ["-p", str(self.port)] if self.port else []
        words += ["-l", self.user] if self.user else []
        return [*words, "--", self.host]


class Talk:
    """The messages over a running ssh, JSON documents and files; work: the working folder on the device."""

    def __init__(self, process: _Ssh, target: Target) -> None:
        self._process, self._target = process, target
        self._incoming, self._outgoing = Incoming(process.stdout), Outgoing(process.stdin)
        self._lock = threading.RLock()
        self.work = ""

    def greet(self, first: Iterator[bytes]) -> None:
        """Sends what starts the agent and waits for its first message; skips what a login shell prints before it.

        Raises EngineError where it does not come, or is of another protocol.
        """
        # Skip lines, but keep their end for an error.
        skipped, end = b"", time.monotonic() + timing().greeting_seconds
        try:
            self.write(first, end)
            for _ in range(BANNER_LINES):
                line = self._incoming.line(BANNER_BYTES, end)
                hello = document_of(line)
                if "protocol" in hello or "error" in hello:
                    break
                skipped = (skipped + line)[-1000:]
                if not line:
                    raise self.lost(skipped, before=True)
            else:
                raise Late
        except Late:
            self._process.kill()
            raise self.lost(skipped, before=True) from None
        except (BrokenPipeError, ValueError):
            raise self._last_words(before=True) from None
        # The agent must be that of this version.
        greeting = self._read(Hello, hello)
        if greeting.protocol != PROTOCOL:
            raise EngineError(
                f"{self._target} speaks protocol {greeting.protocol}, but this edgeprune speaks {PROTOCOL}",
                "This is a bug: please report it.",
            )
        self.work = greeting.work

    def say(self, document: dict[str, Any]) -> None:
        """Sends a document."""
        self.send(iter([json.dumps(document).encode() + b"\n"]))

    def send(self, body: Iterator[bytes], size: int = 0) -> None:
        """Sends `size` bytes, or a document; raises EngineError with the reason where nobody reads them."""
        try:
            self.write(body, time.monotonic() + timing().answer_seconds + size / SLOWEST_NETWORK)
        except Late:
            raise self._silent() from None
        except (BrokenPipeError, ValueError):
            raise self._last_words() from None

    def write(self, body: Iterator[bytes], end: float) -> None:
        """Writes bytes to ssh without anything in between.

        Raises OSError or ValueError where nobody reads them, Late where they are not read before the end, a time, or
        for too long: ssh is ended then, because half a message is on its way.
        """
        with self._lock:
            for chunk in body:
                try:
                    self._outgoing.write(chunk, _soon(end))
                except Late:
                    self._process.kill()
                    raise

    def put(self, sha256: str, size: int, body: Iterator[bytes]) -> None:
        """Sends a file; the lock keeps every sign of life out between its announcement and its bytes."""
        with self._lock:
            self.say({"do": "put", "sha256": sha256, "size": size})
            self.hear(Go)
            self.send(body, size)
        self.hear(Done, timing().answer_seconds + size / SLOWEST_DISK)

    def hear(
        self, kind: type[AnyMessage], seconds: float | None = None, on_progress: OnProgress | None = None
    ) -> AnyMessage:
        """Returns the next message, which is of that kind; progress before it is passed on.

        seconds: until it must have come, whatever signs of life there are; None: those of an answer without work.
        Raises EngineError where it is an error or another message, where it does not come, or where the connection
        ended.
        """
        seconds = timing().answer_seconds if seconds is None else seconds
        end = time.monotonic() + seconds
        while True:
            try:
                line = self._incoming.line(MOST_LINE, _soon(end))
            except Late:
                line = b""
                if time.monotonic() < end:
                    raise self._silent() from None
            if time.monotonic() >= end:
                self._process.kill()
                raise Unreachable(f"{self._target} did not answer within {seconds:.0f} s", _SILENT)
            if len(line) >= MOST_LINE:
                self._process.kill()
                raise BadAnswer(f"{self._target} sends a line without an end", REMEDY)
            document = document_of(line)
            if not document:
                if line.endswith(b"\n"):  # the connection stands
                    shown = one_line(line[:100].decode(errors="replace"))
                    raise BadAnswer(f"{self._target} sends a line that is no message: {shown!r}", REMEDY)
                raise self.lost(line)
            if document == ALIVE:
                continue
            if on_progress is not None and "progress" in document:
                on_progress(*self._read(Step, document).state)
                continue
            return self._read(kind, document)

    def _read(self, kind: type[AnyMessage], document: dict[str, Any]) -> AnyMessage:
        """Returns a document as a message of that kind; raises EngineError where it is an error or something else."""
        if "error" in document:
            refusal = read_message(Refusal, document, str(self._target))
            raise EngineError(f"{self._target}: {refusal.error}", refusal.remedy)
        return read_message(kind, document, str(self._target))

    def take(self, size: int) -> Iterator[bytes]:
        """Yields the next `size` bytes in chunks; raises EngineError where the connection ends before."""
        end = time.monotonic() + timing().answer_seconds + size / SLOWEST_NETWORK
        while size:
            try:
                chunk = self._incoming.some(min(CHUNK, size), _soon(end))
            except Late:
                raise self._silent() from None
            if not chunk:
                raise self.lost()
            size -= len(chunk)
            yield chunk

    def _silent(self) -> EngineError:
        """Ends ssh, and returns the error for a device that does not go on."""
        self._process.kill()
        return Unreachable(f"{self._target} gave no sign of life for {timing().silence_seconds:.0f} s", _SILENT)

    def _last_words(self, before: bool = False) -> EngineError:
        """Returns the error for which nobody reads any longer: that of the agent, if it sent one, else that of ssh."""
        self._process.leave()
        end = time.monotonic() + timing().leave_seconds
        with contextlib.suppress(Late):
            while line := self._incoming.line(BANNER_BYTES, end):
                if "error" in (document := document_of(line)):
                    refusal = read_message(Refusal, document, str(self._target))
                    return EngineError(f"{self._target}: {refusal.error}", refusal.remedy)
        return self.lost(before=before)

    def lost(self, line: bytes = b"", before: bool = False) -> EngineError:
        """Returns the error that explains the end of ssh, with a remedy.

        line: what was read last; before: no agent ever ran.
        """
        # Collect the last output, and the command with which the user can try it by hand.
        self._process.leave()
        tail = (line[-1000:] + self._process.stderr_tail()).decode(errors="replace")
        output = one_line(tail)
        words = self._target.words()
        by_hand = shlex.join(["ssh", *words[words.index(_LAST_OPTION) + 1 :]])
        # 255 is ssh's own exit status: it failed before an agent ran, perhaps in a known way.
        if before and self._process.returncode == 255:
            for needle, meaning, remedy in _COMPLAINTS:
                if needle in output.lower():
                    return Unreachable(f"{self._target}: {meaning} ({output[-200:]})", remedy.format(ssh=by_hand))
        # Else name the stage at which it ended.
        output = output[-300:] or "ssh printed nothing"
        if before and self._process.returncode == 127:
            return EngineError(f"{self._target} has no python3: {output}", "Install Python 3.10 or newer there.")
        if before:
            return Unreachable(f"{self._target} did not begin: {output}", f"Run it by hand to see why: {by_hand}")
        return Unreachable(
            f"the connection to {self._target} was lost: {output}",
            "The task there ends by itself. Check the network and the device and try again; a fit goes on with "
            "--resume.",
        )


def _soon(end: float) -> float:
    """Returns the time until which the next sign of life is waited for; end: of the whole."""
    return min(end, time.monotonic() + timing().silence_seconds)


@contextlib.contextmanager
def talking(target: Target, first: Iterator[bytes]) -> Iterator[Talk]:
    """Opens ssh to a target, and sends it `first`, which starts the agent there.

    Whatever happens, both end with the block. Raises EngineError where ssh or the agent does not begin.
    """
    try:
        process = _Ssh([*target.words(), COMMAND])
    except FileNotFoundError:
        raise EngineError("this machine has no ssh", "Install it: sudo apt install openssh-client") from None
    over = threading.Event()
    try:
        talk = Talk(process, target)
        talk.greet(first)
        threading.Thread(target=_keep_alive, args=(talk, over), daemon=True).start()
        yield talk
    finally:
        over.set()
        process.end()


@contextlib.contextmanager
def forwarding(target: Target, host: str, port: int, far_port: int) -> Iterator[None]:
    """Makes a port of a target's loopback one of this machine's while the block runs: host:port.

    Raises EngineError where ssh cannot open it.
    """
    there = f"[{host}]:{port}:127.0.0.1:{far_port}" if ":" in host else f"{host}:{port}:127.0.0.1:{far_port}"
    options = ["-N", "-o", "ExitOnForwardFailure=yes", "-L", there]
    program, *words = target.words()
    process = _Ssh([program, *options, *words])
    try:
        end = time.monotonic() + CONNECT_SECONDS
        while not _answers(host, port):
            if process.poll() is not None or time.monotonic() > end:
                process.end()
                reason = one_line(process.stderr_tail().decode(errors="replace"))[-300:] or "ssh printed nothing"
                raise EngineError(
                    f"{target}: the port {far_port} there cannot be forwarded to {host}:{port}: {reason}",
                    "See whether its sshd allows it (AllowTcpForwarding), or run serve.pyz there.",
                )
            time.sleep(0.05)
        yield
    finally:
        process.end()


def _answers(host: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=1):
        return True
    return False


class _Ssh(subprocess.Popen):
    """A process of ssh, of whose standard error the end is kept."""

    def __init__(self, words: list[str]) -> None:
        pipe = subprocess.PIPE
        super().__init__(words, bufsize=0, stdin=pipe, stdout=pipe, stderr=pipe)
        self._words = bytearray()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        while data := self.stderr.read(4096):
            self._words += data
            del self._words[:-4000]

    def stderr_tail(self) -> bytes:
        """Returns the end of the standard error."""
        self._listener.join(timeout=2)
        return bytes(self._words)

    def leave(self) -> None:
        """Waits for its end; kills it if it does not come in time."""
        try:
            self.wait(timeout=timing().leave_seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            self.wait()

    def end(self) -> None:
        """Ends the agent by closing the standard input, and then ssh."""
        with contextlib.suppress(OSError):
            self.stdin.close()
        self.leave()
        self._listener.join(timeout=2)
        self.stdout.close()
        if not self._listener.is_alive():  # a shared connection of the user's may live on and hold it
            self.stderr.close()


def _keep_alive(talk: Talk, over: threading.Event) -> None:
    """Sends signs of life until `over` is set."""
    while not over.wait(timing().alive_seconds):
        with contextlib.suppress(OSError, ValueError, Late):  # whoever waits for an answer gets the error
            talk.write(iter([b'{"do": "alive"}\n']), time.monotonic() + timing().answer_seconds)
