"""Runs on the device at the far end of an ssh connection: keeps files by their hash, runs tasks, cleans up.

Python 3.10 and the standard library alone; the tasks that it starts need more. It speaks lines of JSON over
standard input and output, some followed by a file's bytes:

    -> {"do": "have", "hashes": [...]}                  <- {"missing": [...]}
    -> {"do": "put", "sha256": H, "size": N}            <- {"go": true}, then -> N bytes, <- {"done": true}
    -> {"do": "run", "request": {...}, "files": {ROLE: [NAME, ...]}, "hashes": {NAME: H}, "outputs": {ROLE: NAME},
        "timeout": SECONDS}                             <- {"progress": [...]} ..., {"answer": {...}, "made": {ROLE: H}}
    -> {"do": "get", "sha256": H}                       <- {"size": N}, then N bytes
    -> {"do": "alive"}                                  <- nothing: the workstation is still there
    -> {"do": "bye", "keep": false}                     <- {"left": PATH or null}, the end
    any of them may be answered by {"error": MESSAGE, "remedy": REMEDY}

When the connection ends, or the workstation says nothing for some time, the running task is killed and the
working folder removed. Files stay in the store until the disk is needed.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import queue
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, BinaryIO

from edgeprune.cache import cache_folder
from edgeprune.engine.child import ask
from edgeprune.errors import EdgepruneError, EngineError

PROTOCOL = 1
SILENCE_SECONDS = 90.0  # the workstation says that it is there every 15
FRESH_SECONDS = 60.0
CHUNK = 1 << 20
TASKS = "edgeprune.engine.tasks"


class Store:
    """Files by their sha256; the least recently used go where the disk is full."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._used: set[str] = set()
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, sha256: str) -> Path:
        if len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef"):
            raise EngineError(f"{sha256!r} is no sha256", "This is a bug: please report it.")
        return self.folder / sha256

    def missing(self, hashes: list[str]) -> list[str]:
        self._used |= set(hashes)
        for sha256 in hashes:
            if self.path(sha256).exists():
                os.utime(self.path(sha256))
        return [sha256 for sha256 in hashes if not self.path(sha256).exists()]

    def make_room(self, size: int) -> None:
        """Raises EngineError where the disk has no room even without the files that nobody needs now."""
        others = [path for path in self.folder.iterdir() if path.name not in self._used]
        for path in sorted(others, key=lambda path: path.stat().st_mtime):
            if shutil.disk_usage(self.folder).free > size:
                break
            path.unlink()
        free = shutil.disk_usage(self.folder).free
        if free <= size:
            raise full(self.folder, size, free)

    def take(self, stream: BinaryIO, sha256: str, size: int) -> None:
        """A file of `size` bytes from a stream, kept if it is what its hash says."""
        digest, left, problem = hashlib.sha256(), size, None
        with tempfile.NamedTemporaryFile(dir=self.folder, prefix="part-", buffering=0) as file:
            while left:
                chunk = stream.read(min(CHUNK, left))
                if not chunk:
                    raise EOFError
                digest.update(chunk)
                left -= len(chunk)
                try:
                    if problem is None and file.write(chunk) < len(chunk):
                        problem = OSError(errno.ENOSPC, "the disk is full")
                except OSError as error:  # the rest is read all the same: the next line begins after it
                    problem = error
            if problem is not None:
                raise problem
            if digest.hexdigest() != sha256:
                raise EngineError("a file arrived damaged", "Try again; if it persists, check the network.")
            os.link(file.name, self.path(sha256))

    def add(self, path: Path) -> str:
        """Keep a file that a task made; its hash."""
        with path.open("rb") as file:
            digest = hashlib.sha256()
            while chunk := file.read(CHUNK):
                digest.update(chunk)
        sha256 = digest.hexdigest()
        self._used.add(sha256)
        if not self.path(sha256).exists():
            os.link(path, self.path(sha256))
        return sha256


def full(folder: Path, size: int, free: int) -> EngineError:
    return EngineError(
        f"the device's disk is full: {folder} needs {size / 2**20:.0f} MiB and has {free / 2**20:.0f} MiB free",
        f"Free some space on the device, for example by removing {folder.parent}.",
    )


class Agent:
    """One conversation."""

    def __init__(self, source: BinaryIO, sink: BinaryIO, folder: Path) -> None:
        self._source, self._sink = source, sink
        self._lines: queue.Queue[bytes] = queue.Queue()
        self._body = threading.Semaphore(0)  # the reader waits while the main thread takes a file's bytes
        self._heard = threading.Event()
        self.store = Store(folder / "sha256")
        self.work = _working_folder(folder)

    def serve(self) -> None:
        threading.Thread(target=self._read, daemon=True).start()
        threading.Thread(target=self._watch, daemon=True).start()
        while True:
            message = json.loads(self._lines.get())
            try:
                if message["do"] == "bye":
                    self._bye(message["keep"])
                    return
                {"have": self._have, "put": self._put, "run": self._run, "get": self._get}[message["do"]](message)
            except EdgepruneError as error:
                self.send({"error": error.message, "remedy": error.remedy})
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                problem = full(self.store.folder, message.get("size", 0), shutil.disk_usage(self.store.folder).free)
                self.send({"error": problem.message, "remedy": problem.remedy})

    def send(self, document: dict[str, Any]) -> None:
        self._sink.write(json.dumps(document).encode() + b"\n")
        self._sink.flush()

    def _read(self) -> None:
        """Lines from the workstation; its end is the end of everything here."""
        while line := self._source.readline():
            self._heard.set()
            do = json.loads(line)["do"]
            if do == "alive":
                continue
            self._lines.put(line)
            if do in ("put", "bye"):
                self._body.acquire()
        os.kill(os.getpid(), signal.SIGTERM)

    def _watch(self) -> None:
        while self._heard.wait(SILENCE_SECONDS):
            self._heard.clear()
        os.kill(os.getpid(), signal.SIGTERM)

    def _have(self, message: dict[str, Any]) -> None:
        self.send({"missing": self.store.missing(message["hashes"])})

    def _put(self, message: dict[str, Any]) -> None:
        try:
            self.store.make_room(message["size"])
            self.send({"go": True})
            self.store.take(_Heard(self._source, self._heard), message["sha256"], message["size"])
        finally:
            self._body.release()
        self.send({"done": True})

    def _run(self, message: dict[str, Any]) -> None:
        for name, sha256 in message["hashes"].items():
            path = self._inside(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            os.link(self.store.path(sha256), path)
        outputs = {role: self._inside(name) for role, name in message["outputs"].items()}
        for path in outputs.values():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
        request = {
            **message["request"],
            "files": {role: str(self._inside(name)) for role, name in message["files"].items()},
            "outputs": {role: str(path) for role, path in outputs.items()},
        }
        answer = ask(TASKS, request, message["timeout"], lambda *state: self.send({"progress": state}))
        self.send({"answer": answer, "made": {role: self.store.add(path) for role, path in outputs.items()}})

    def _inside(self, name: str) -> Path:
        path = (self.work / name).resolve()
        if not path.is_relative_to(self.work.resolve()):
            raise EngineError(f"{name!r} is outside of the working folder", "This is a bug: please report it.")
        return path

    def _get(self, message: dict[str, Any]) -> None:
        with self.store.path(message["sha256"]).open("rb") as file:
            self.send({"size": os.fstat(file.fileno()).st_size})
            shutil.copyfileobj(file, self._sink, CHUNK)
        self._sink.flush()

    def _bye(self, keep: bool) -> None:
        if not keep:
            self.clean()
        self.send({"left": str(self.work) if keep else None})

    def clean(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)


class _Heard:
    """A stream that tells of every read: a long file is a sign of life too."""

    def __init__(self, stream: BinaryIO, heard: threading.Event) -> None:
        self._stream, self._event = stream, heard

    def read(self, size: int) -> bytes:
        self._event.set()
        return self._stream.read(size)


def _working_folder(folder: Path) -> Path:
    """A new folder, locked as long as this process lives; those whose process is gone are removed."""
    works = folder / "work"
    works.mkdir(parents=True, exist_ok=True)
    for old in works.iterdir():
        if time.time() - old.stat().st_mtime < FRESH_SECONDS:
            continue  # perhaps made just now, and not locked yet
        with (works / old.name / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue
        shutil.rmtree(old, ignore_errors=True)
    new = Path(tempfile.mkdtemp(dir=works))
    descriptor = os.open(new / "lock", os.O_CREAT | os.O_WRONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)  # held until the process ends
    return new


def main() -> int:
    """Serve until the workstation leaves; whatever ends it, nothing stays running and no work folder is left."""

    def leave(number: int, frame: object) -> None:
        sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, leave)
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not enter the conversation
    agent, kept = None, False
    try:
        agent = Agent(sys.stdin.buffer, sink, cache_folder())
        agent.send({"protocol": PROTOCOL, "python": sys.version.split()[0]})
        agent.serve()
        kept = True
    except (BrokenPipeError, EOFError):
        return 1
    except OSError as error:
        sink.write(json.dumps({
            "error": f"the device's folder {cache_folder()} cannot be used: {error.strerror}",
            "remedy": "Free some space there, or make it writable for this user.",
        }).encode() + b"\n")  # fmt: skip
        return 4
    finally:
        if agent is not None and not kept:
            agent.clean()
    return 0


if __name__ == "__main__":
    sys.exit(main())
