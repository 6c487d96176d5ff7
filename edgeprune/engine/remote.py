"""Runs tasks on a device over the system's ssh: its config, its keys, its known_hosts; nothing is installed there.

The device needs python3 (3.10) and what the task needs (numpy, TensorRT and a CUDA module, or onnxruntime).
The program that runs there is packed at run time from the very files that run here.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import shlex
import subprocess
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from edgeprune import __version__
from edgeprune.engine.agent import CHUNK, PROTOCOL
from edgeprune.engine.child import Tell
from edgeprune.errors import EngineError, InputError

DEVICE_FILES = (
    "__init__.py", "errors.py", "cache.py", "budget.py", "bundle.py", "finish.py", "engine/__init__.py",
    *(f"engine/{name}.py" for name in (
        "base", "wire", "child", "facts", "latency", "check", "onnxruntime", "tensorrt", "cuda", "gpu", "tasks",
        "perform", "agent", "probing",
    )),
)  # fmt: skip
ALIVE_SECONDS = 15.0
CONNECT_SECONDS = 20
# Reads a program of the length that the first line says and runs it: the same words in every shell.
COMMAND = "python3 -c 'import sys; exec(sys.stdin.buffer.read(int(sys.stdin.buffer.readline())))'"
BOOT = """
import json, os, runpy, sys
if sys.version_info < (3, 10):
    print(json.dumps({"error": "the device has Python %d.%d" % sys.version_info[:2],
                      "remedy": "Install Python 3.10 or newer there, as python3."}))
    sys.exit(4)
os.environ.setdefault("EDGEPRUNE_CACHE", os.path.expanduser("~/.cache/edgeprune-device"))
folder = os.environ["EDGEPRUNE_CACHE"]
size, name = sys.stdin.buffer.readline().decode().split()
program = sys.stdin.buffer.read(int(size))
path = os.path.join(folder, name)
try:
    os.makedirs(folder, mode=0o700, exist_ok=True)
    with open(path + ".%d" % os.getpid(), "wb") as file:
        file.write(program)
    os.replace(file.name, path)
except OSError as error:
    print(json.dumps({"error": "the device's folder %s cannot be written: %s" % (folder, error.strerror),
                      "remedy": "Free some space there, or make it writable for this user."}))
    sys.exit(4)
sys.path.insert(0, path)
runpy.run_module("edgeprune.engine.agent", run_name="__main__", alter_sys=True)
"""
_COMPLAINTS = (
    ("host key verification failed", "its host key is not the known one, or not known yet",
     "Connect once by hand and compare the key: {ssh}"),
    ("remote host identification has changed", "its host key is not the known one",
     "If the device was set up anew, remove the old key with ssh-keygen -R and connect once by hand: {ssh}"),
    ("permission denied", "it does not let this user in",
     "Install your key there (ssh-copy-id), or load it into ssh-agent; check with: {ssh}"),
    ("could not resolve", "its name is not known", "Check the name, or give its address."),
    ("connection refused", "it refuses the connection", "Check the port, and that sshd runs there."),
    ("timed out", "it does not answer", "Check that the device is on, and the network."),
    ("no route to host", "it cannot be reached", "Check that the device is on, and the network."),
)  # fmt: skip


@dataclass(frozen=True)
class Target:
    """A device by its ssh address."""

    user: str | None
    host: str
    port: int | None

    @staticmethod
    def parse(text: str) -> Target:
        """`ssh://[user@]host[:port]`. Raises InputError; nothing that ssh could take for an option passes."""
        remedy = "Write ssh://user@host or ssh://user@host:port; ssh asks for no password here, use a key."
        try:
            parts = urlsplit(text)
            port = parts.port
        except ValueError:
            raise InputError(f"malformed target {text!r}: the port is no number from 0 to 65535", remedy) from None
        if parts.scheme != "ssh" or not parts.hostname or parts.path not in ("", "/") or parts.query or parts.fragment:
            raise InputError(f"malformed target {text!r}", remedy)
        if parts.password is not None:
            raise InputError("the target holds a password, which other users of this machine could read", remedy)
        host = parts.netloc.rpartition("@")[2]  # as it is written: a name in ~/.ssh/config may have capitals
        host = parts.hostname if host.startswith("[") else re.sub(r":\d+$", "", host)
        for word in filter(None, (parts.username, host)):
            if not re.fullmatch(r"[A-Za-z0-9_.:%][A-Za-z0-9_.:%\-]*", word):
                raise InputError(f"malformed target {text!r}: {word!r} is no name", remedy)
        return Target(parts.username, host, port)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"ssh://{self.user + '@' if self.user else ''}{host}{f':{self.port}' if self.port else ''}"

    def words(self) -> list[str]:
        """The ssh command line up to the host."""
        words = ["ssh", "-T", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}"]
        words += ["-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4"]
        words += ["-p", str(self.port)] if self.port else []
        words += ["-l", self.user] if self.user else []
        return [*words, "--", self.host]


def program() -> bytes:
    """The device's files as one zip; python3 runs it as the bundle's `finish.pyz`, the boot code as the agent."""
    root = package_files("edgeprune")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:

        def add(name: str, text: str) -> None:  # the same bytes at every time and place
            archive.writestr(zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0)), text, zipfile.ZIP_DEFLATED)

        for name in DEVICE_FILES:
            add(f"edgeprune/{name}", root.joinpath(name).read_text(encoding="utf-8"))
        metadata = f"Metadata-Version: 2.1\nName: edgeprune\nVersion: {__version__}\n"
        add(f"edgeprune-{__version__}.dist-info/METADATA", metadata)
        add("__main__.py", "import sys\nfrom edgeprune.finish import main\n\nsys.exit(main())\n")
    return buffer.getvalue()


@dataclass(frozen=True)
class Device:
    """Runs each task in a conversation of its own, so that nothing is held open while this machine prunes."""

    target: Target
    keep: bool = False

    def __str__(self) -> str:
        return str(self.target)

    def run(self, request: dict[str, Any], timeout_seconds: float, tell: Tell) -> dict[str, Any]:
        """Send what the device does not have, run, fetch what was made.

        Raises EngineError where the device cannot be reached, the connection is lost, the disk is full, or the
        task fails in one of its ways.
        """
        names = _names({role: Path(path) for role, path in request.get("files", {}).items()})
        outputs = {role: Path(path) for role, path in request.get("outputs", {}).items()}
        with _conversation(self.target) as talk:
            hashes = _send_files(talk, names, tell)
            roles = {role: _relative(role, Path(path)) for role, path in request.get("files", {}).items()}
            talk.say({
                "do": "run", "request": request, "files": roles, "hashes": hashes, "timeout": timeout_seconds,
                "outputs": {role: f"out/{path.name}" for role, path in outputs.items()},
            })  # fmt: skip
            while "progress" in (answer := talk.hear()):
                tell(*answer["progress"])
            for role, path in outputs.items():
                _fetch(talk, answer["made"][role], path, tell)
            talk.say({"do": "bye", "keep": self.keep})
            left = talk.hear()["left"]
            if left is not None:
                tell(f"left on the device: {left}", 1, 1)
        return answer["answer"]


class _Talk:
    """The two ends of a running ssh."""

    def __init__(self, process: subprocess.Popen, target: Target) -> None:
        self._process, self._target = process, target
        self._lock = threading.RLock()

    def say(self, document: dict[str, Any]) -> None:
        self.send(iter([json.dumps(document).encode() + b"\n"]))

    def send(self, body: Iterator[bytes]) -> None:
        with self._lock:
            try:
                for chunk in body:
                    self._process.stdin.write(chunk)
                self._process.stdin.flush()
            except (BrokenPipeError, ValueError):
                raise self.lost() from None

    def put(self, sha256: str, size: int, body: Iterator[bytes]) -> None:
        """A file; no sign of life gets in between its announcement and its bytes."""
        with self._lock:
            self.say({"do": "put", "sha256": sha256, "size": size})
            self.hear()
            self.send(body)
        self.hear()

    def hear(self) -> dict[str, Any]:
        """The next document. Raises EngineError where it tells one, or the connection ended."""
        line = self._process.stdout.readline()
        try:
            document = json.loads(line)
            failed = "error" in document
        except (ValueError, TypeError):
            raise self.lost(line) from None
        if failed:
            raise EngineError(f"{self._target}: {document['error']}", document["remedy"])
        return document

    def take(self, size: int) -> Iterator[bytes]:
        while size:
            chunk = self._process.stdout.read(min(CHUNK, size))
            if not chunk:
                raise self.lost()
            size -= len(chunk)
            yield chunk

    def lost(self, line: bytes = b"") -> EngineError:
        """What ssh says about its end, as one message with a remedy."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=10)
        said = " ".join((line + self._process.stderr_tail()).decode(errors="replace").split())[-300:]
        by_hand = shlex.join(["ssh", *self._target.words()[self._target.words().index("ServerAliveCountMax=4") + 1 :]])
        for needle, meaning, remedy in _COMPLAINTS:
            if needle in said.lower():
                return EngineError(f"{self._target}: {meaning} ({said})", remedy.format(ssh=by_hand))
        if self._process.returncode == 127 or "python3" in said and "not found" in said:
            return EngineError(f"{self._target} has no python3: {said}", "Install Python 3.10 or newer there.")
        return EngineError(
            f"the connection to {self._target} was lost: {said or 'ssh says nothing'}",
            "Nothing is left running there. Check the network and the device, then go on with --resume.",
        )


@contextlib.contextmanager
def _conversation(target: Target) -> Iterator[_Talk]:
    """ssh with the agent at its far end; whatever happens, both end with this block."""
    try:
        process = _Ssh([*target.words(), COMMAND])
    except FileNotFoundError:
        raise EngineError("this machine has no ssh", "Install it: sudo apt install openssh-client") from None
    over = threading.Event()
    try:
        talk = _Talk(process, target)
        packed = program()
        name = f"agent-{hashlib.sha256(packed).hexdigest()[:16]}.pyz"
        boot = BOOT.encode()
        parts = (f"{len(boot)}\n".encode(), boot, f"{len(packed)} {name}\n".encode(), packed)
        talk.send(iter(parts))
        hello = talk.hear()
        if hello.get("protocol") != PROTOCOL:
            raise EngineError(f"{target} answers with something else: {hello}", "Check what its login shell prints.")
        threading.Thread(target=_keep_alive, args=(talk, over), daemon=True).start()
        yield talk
    finally:
        over.set()
        process.end()


class _Ssh(subprocess.Popen):
    """ssh, with the last words of its standard error kept."""

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
        self._listener.join(timeout=2)
        return bytes(self._words)

    def end(self) -> None:
        """Its standard input closes, which ends the agent; what does not leave then is killed."""
        with contextlib.suppress(OSError):
            self.stdin.close()
        try:
            self.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.kill()
            self.wait()
        self._listener.join(timeout=2)
        for stream in (self.stdout, self.stderr):
            stream.close()


def _keep_alive(talk: _Talk, over: threading.Event) -> None:
    while not over.wait(ALIVE_SECONDS):
        try:
            talk.say({"do": "alive"})
        except EngineError:  # who waits for an answer hears of it
            return


def _names(files: dict[str, Path]) -> dict[str, Path]:
    """Every file that must be there, by its name on the device: a graph's weights stand beside it."""
    found = {}
    for role, path in files.items():
        found[_relative(role, path)] = path
        if path.suffix == ".onnx":
            found.update({_relative(role, data): data for data in path.parent.glob("*.data")})
    return found


def _relative(role: str, path: Path) -> str:
    return f"{role}/{path.name}"


def _send_files(talk: _Talk, names: dict[str, Path], tell: Tell) -> dict[str, str]:
    """Hashes of all files by name, after the device has them all."""
    hashes = {}
    for name, path in names.items():
        with path.open("rb") as file:
            hashes[name] = hashlib.file_digest(file, "sha256").hexdigest()
    talk.say({"do": "have", "hashes": sorted(set(hashes.values()))})
    missing = talk.hear()["missing"]
    sources = {sha256: names[name] for name, sha256 in hashes.items() if sha256 in missing}
    total, sent = sum(path.stat().st_size for path in sources.values()), 0
    for sha256, path in sources.items():
        size = path.stat().st_size

        def body(path: Path = path) -> Iterator[bytes]:
            nonlocal sent
            with path.open("rb") as file:
                while chunk := file.read(CHUNK):
                    yield chunk
                    sent += len(chunk)
                    tell("send to the device", sent, total)

        talk.put(sha256, size, body())
    return hashes


def _fetch(talk: _Talk, sha256: str, path: Path, tell: Tell) -> None:
    talk.say({"do": "get", "sha256": sha256})
    size = talk.hear()["size"]
    temporary, digest, got = path.with_name(f"{path.name}.part"), hashlib.sha256(), 0
    with temporary.open("wb") as file:
        for chunk in talk.take(size):
            file.write(chunk)
            digest.update(chunk)
            got += len(chunk)
            tell("fetch from the device", got, size)
    if digest.hexdigest() != sha256:
        temporary.unlink()
        raise EngineError(f"{path.name} arrived damaged", "Try again; if it persists, check the network.")
    temporary.replace(path)
