"""One ssh connection to a device: its address, the messages in both directions, and the meaning of its end.

It does not know the tasks that run there. It is the system's ssh with the user's config, keys and known_hosts. It
never asks the user anything, and it checks the host's key.
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from edgeprune.errors import EngineError, InputError, Unreachable
from edgeprune.ondevice.agent import CHUNK, PROTOCOL
from edgeprune.ondevice.durations import timing

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
BANNER_LINES = 1000  # that a login shell may print before the agent begins
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
        self._lock = threading.RLock()
        self.work = ""

    def greet(self) -> None:
        """Waits for the agent's first message, and skips what a login shell prints before it.

        Raises EngineError where it does not come, or is of another protocol.
        """
        # Skip lines, but keep their end for an error.
        skipped = b""
        for _ in range(BANNER_LINES):
            line = self._process.stdout.readline()
            hello = _document(line)
            if "protocol" in hello or "error" in hello:
                break
            skipped = (skipped + line)[-1000:]
            if not line:
                raise self.lost(skipped, before=True)
        else:
            self._process.kill()
            raise self.lost(skipped, before=True)
        # The agent must be that of this version.
        self._check(hello)
        if hello["protocol"] != PROTOCOL:
            raise EngineError(
                f"{self._target} speaks protocol {hello['protocol']}, but this edgeprune speaks {PROTOCOL}",
                "This is a bug: please report it.",
            )
        self.work = hello["work"]

    def say(self, document: dict[str, Any]) -> None:
        """Sends a document."""
        self.send(iter([json.dumps(document).encode() + b"\n"]))

    def send(self, body: Iterator[bytes], before: bool = False) -> None:
        """Sends bytes; raises EngineError with the reason where nobody reads them. before: no agent runs yet."""
        try:
            self.write(body)
        except (BrokenPipeError, ValueError):
            raise self._last_words(before) from None

    def write(self, body: Iterator[bytes]) -> None:
        """Writes bytes to ssh without anything in between; raises OSError or ValueError where nobody reads them."""
        with self._lock:
            for chunk in body:
                self._process.stdin.write(chunk)
            self._process.stdin.flush()

    def put(self, sha256: str, size: int, body: Iterator[bytes]) -> None:
        """Sends a file; the lock keeps every sign of life out between its announcement and its bytes."""
        with self._lock:
            self.say({"do": "put", "sha256": sha256, "size": size})
            self.hear()
            self.send(body)
        self.hear()

    def hear(self) -> dict[str, Any]:
        """Returns the next document. Raises EngineError where it is an error, or the connection ended."""
        line = self._process.stdout.readline()
        document = _document(line)
        if not document:
            raise self.lost(line)
        return self._check(document)

    def _check(self, document: dict[str, Any]) -> dict[str, Any]:
        """Returns a document; raises EngineError where it is an error."""
        if "error" in document:
            raise EngineError(f"{self._target}: {document['error']}", document["remedy"])
        return document

    def take(self, size: int) -> Iterator[bytes]:
        """Yields the next `size` bytes in chunks; raises EngineError where the connection ends before."""
        while size:
            chunk = self._process.stdout.read(min(CHUNK, size))
            if not chunk:
                raise self.lost()
            size -= len(chunk)
            yield chunk

    def _last_words(self, before: bool) -> EngineError:
        """Returns the error for which nobody reads any longer: that of the agent, if it sent one, else that of ssh."""
        self._process.leave(10)
        for line in self._process.stdout:
            try:
                self._check(_document(line))
            except EngineError as error:
                return error
        return self.lost(before=before)

    def lost(self, line: bytes = b"", before: bool = False) -> EngineError:
        """Returns the error that explains the end of ssh, with a remedy.

        line: what was read last; before: no agent ever ran.
        """
        # Collect the last output, and the command with which the user can try it by hand.
        self._process.leave(10)
        output = " ".join((line + self._process.stderr_tail()).decode(errors="replace").split())
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


def _document(line: bytes) -> dict[str, Any]:
    """Returns the document in a line of the agent; empty where the line is something else."""
    with contextlib.suppress(ValueError):
        document = json.loads(line)
        return document if isinstance(document, dict) else {}
    return {}


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
        talk.send(first, before=True)
        talk.greet()
        threading.Thread(target=_keep_alive, args=(talk, over), daemon=True).start()
        yield talk
    finally:
        over.set()
        process.end()


class _Ssh(subprocess.Popen):
    """A process of ssh, of whose standard error the end is kept."""

    def __init__(self, words: list[str]) -> None:
        super().__init__(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self._words = bytearray()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        for line in self.stderr:
            self._words += line
            del self._words[:-4000]

    def stderr_tail(self) -> bytes:
        """Returns the end of the standard error."""
        self._listener.join(timeout=2)
        return bytes(self._words)

    def leave(self, seconds: float) -> None:
        """Waits for its end; kills it if it does not come in time."""
        try:
            self.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            self.wait()

    def end(self) -> None:
        """Ends the agent by closing the standard input, and then ssh."""
        with contextlib.suppress(OSError):
            self.stdin.close()
        self.leave(5)
        self._listener.join(timeout=2)
        self.stdout.close()
        if not self._listener.is_alive():  # a shared connection of the user's may live on and hold it
            self.stderr.close()


def _keep_alive(talk: Talk, over: threading.Event) -> None:
    """Sends signs of life until `over` is set."""
    while not over.wait(timing().alive_seconds):
        with contextlib.suppress(OSError, ValueError):  # whoever waits for an answer gets the error
            talk.write(iter([b'{"do": "alive"}\n']))
