"""The agent on the device, at the far end of an ssh connection: it keeps files by hash, runs tasks and cleans up.

It needs Python 3.10 and the standard library alone; the tasks that it starts need more. It does not know what they
do. It exchanges lines of JSON over standard input and output, some of which are followed by a file's bytes:

                                                        <- {"protocol": 1, "work": PATH, ...}, before anything else
    -> {"do": "have", "sizes": {H: N}}                  <- {"missing": [H, ...]}, which have room on the disk
    -> {"do": "put", "sha256": H, "size": N}            <- {"go": true}, then -> N bytes, <- {"done": true}
    -> {"do": "run", "request": {...}, "files": {ROLE: [NAME, ...]}, "hashes": {NAME: H}, "outputs": {ROLE: NAME},
        "timeout": SECONDS, "keep": false}              <- {"progress": [...]} ..., {"answer": {...}, "made": {ROLE: H}}
    -> {"do": "get", "sha256": H}                       <- {"size": N}, then N bytes
    -> {"do": "alive"}                                  <- nothing: it shows that the workstation is there
    -> {"do": "bye"}                                    <- {"left": PATH or null}, the end
    each of them may be answered by {"error": MESSAGE, "remedy": REMEDY}, and {"alive": true} may come before any answer

When the connection ends, or the workstation sends nothing for some time, the running task is killed and the
working folder is removed, unless it is to be kept. Files stay in the store until their room on the disk is needed.
"""

from __future__ import annotations

import contextlib
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
import traceback
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

from edgeprune.cache import cache_folder
from edgeprune.errors import EdgepruneError, EngineError
from edgeprune.ondevice.durations import timing
from edgeprune.ondevice.worker import DISK_FULL, ask

PROTOCOL = 1
CHUNK = 1 << 20
TASKS = "edgeprune.ondevice.tasks"
ENDS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
PART, LOCK, KEEP = "part-", "lock", "keep"


class Store:
    """The files kept by their sha256, of which the least recently used are removed when the disk is full."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._used: set[str] = set()
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, sha256: str) -> Path:
        """Returns the path of a file that is or will be kept. Raises EngineError where the hash is malformed."""
        if len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef"):
            raise EngineError(f"{sha256!r} is not a sha256", "This is a bug: please report it.")
        return self.folder / sha256

    def missing(self, sizes: dict[str, int]) -> list[str]:
        """Returns the hashes of the files that are not kept in their full size; removes incomplete ones."""
        self._used |= set(sizes)
        missing = []
        for sha256, size in sizes.items():
            path = self.path(sha256)
            if path.exists() and path.stat().st_size == size:
                os.utime(path)
            else:
                path.unlink(missing_ok=True)
                missing.append(sha256)
        return missing

    def make_room(self, size: int) -> None:
        """Removes unused files until `size` bytes fit on the disk.

        Raises EngineError where they do not fit even without those files.
        """
        for path in self._unused():
            if shutil.disk_usage(self.folder).free > size:
                break
            path.unlink(missing_ok=True)
        free = shutil.disk_usage(self.folder).free
        if size and free <= size:
            raise full(self.folder, size, free)

    def _unused(self) -> list[Path]:
        """Returns the files that may be removed, oldest first.

        Those that this run needs, and those that another run is receiving, are not among them.
        """
        unused = []
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another run makes room too
                used, fresh = path.stat().st_mtime, path.name.startswith(PART)
                if path.name not in self._used and not (fresh and time.time() - used < timing().fresh_seconds):
                    unused.append((used, path))
        return [path for _, path in sorted(unused)]

    def take(self, stream: _WatchedStream, sha256: str, size: int) -> None:
        """Reads a file of `size` bytes from a stream and keeps it if it has the hash.

        Raises EOFError where the stream ends early, OSError where the file cannot be written, EngineError where its
        hash is another.
        """
        digest, left, problem = hashlib.sha256(), size, None
        # Read all of it into a temporary file, and hash it on the way.
        with tempfile.NamedTemporaryFile(dir=self.folder, prefix=PART, buffering=0) as file:
            while left:
                chunk = stream.read(min(CHUNK, left))
                if not chunk:
                    raise EOFError
                digest.update(chunk)
                left -= len(chunk)
                try:
                    if problem is None and file.write(chunk) < len(chunk):
                        problem = OSError(errno.ENOSPC, "the disk is full")
                except OSError as error:  # the rest is read nevertheless: the next line begins after it
                    problem = error
            # Keep it only where it is complete and has the hash.
            if problem is not None:
                raise problem
            if digest.hexdigest() != sha256:
                raise EngineError("a file arrived damaged", "Try again; if it persists, check the network.")
            self._keep(Path(file.name), sha256)

    def add(self, path: Path) -> str:
        """Keeps a file that a task made and returns its hash."""
        with path.open("rb") as file:
            digest = hashlib.sha256()
            while chunk := file.read(CHUNK):
                digest.update(chunk)
        sha256 = digest.hexdigest()
        self._used.add(sha256)
        self._keep(path, sha256)
        return sha256

    def give(self, sha256: str, path: Path) -> None:
        """Links a kept file to a path as well. Raises EngineError where it is not kept."""
        try:
            os.link(self.path(sha256), path)
        except FileNotFoundError:
            raise EngineError(
                f"the device does not have the file {sha256} for {path.name}",
                "Another run may have made room on its disk: try again.",
            ) from None

    def _keep(self, path: Path, sha256: str) -> None:
        """Gives a file its hash as a name, once its bytes are on the disk: the name holds after a loss of power."""
        with path.open("rb") as file:
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):  # another run received it at the same time
            os.link(path, self.path(sha256))


def full(folder: Path, size: int, free: int) -> EngineError:
    """Returns the error for a full disk, in bytes: `size` that are needed (0: unknown) and `free` ones."""
    need = f"needs {size / 2**20:.1f} MiB and " if size else ""
    return EngineError(
        f"the device's disk is full: {folder} {need}has {free / 2**20:.1f} MiB free",
        f"Free some space on the device. {folder.parent} holds nothing that cannot be sent again.",
    )


class Agent:
    """One conversation with a workstation, with its store and its working folder."""

    def __init__(self, source: BufferedReader, sink: BinaryIO, folder: Path) -> None:
        self._source, self._sink = source, sink
        self._lines: queue.Queue[bytes] = queue.Queue()
        self._body = threading.Semaphore(0)  # the reader waits while the main thread takes a file's bytes
        self._heard = threading.Event()
        self._sending = threading.RLock()  # a sign of life goes between two messages, never into one
        self.store = Store(folder / "sha256")
        self.work = _working_folder(folder)

    def serve(self) -> None:
        """Answers the workstation's messages until it ends the conversation; errors are answers too."""
        threading.Thread(target=self._read, daemon=True).start()
        threading.Thread(target=self._watch, daemon=True).start()
        threading.Thread(target=self._tell, daemon=True).start()
        while True:
            line = self._lines.get()
            if not line:
                raise EOFError
            message = json.loads(line)
            try:
                if message["do"] == "bye":
                    self.clean()
                    self.send({"left": str(self.work) if self.work.exists() else None})
                    return
                {"have": self._have, "put": self._put, "run": self._run, "get": self._get}[message["do"]](message)
            except EdgepruneError as error:
                self.send({"error": error.message, "remedy": error.remedy})
            except OSError as error:
                if error.errno not in DISK_FULL:
                    raise
                problem = full(self.store.folder, message.get("size", 0), shutil.disk_usage(self.store.folder).free)
                self.send({"error": problem.message, "remedy": problem.remedy})

    def send(self, document: dict[str, Any]) -> None:
        """Writes one line of JSON to the workstation."""
        with self._sending:
            self._sink.write(json.dumps(document).encode() + b"\n")
            self._sink.flush()

    def _tell(self) -> None:
        """Sends signs of life while this process lives: a build may say nothing for an hour."""
        with contextlib.suppress(OSError, ValueError):  # the end of the connection ends the process elsewhere
            while True:
                time.sleep(timing().alive_seconds)
                self.send({"alive": True})

    def _read(self) -> None:
        """Reads lines from the workstation into the queue; their end ends this process."""
        try:
            while line := self._source.readline():
                self._heard.set()
                do = json.loads(line)["do"]
                if do == "alive":
                    continue
                self._lines.put(line)
                if do in ("put", "bye"):
                    self._body.acquire()
        finally:
            self._end()

    def _watch(self) -> None:
        """Ends this process when nothing came from the workstation for some time."""
        while self._heard.wait(timing().silence_seconds):
            self._heard.clear()
        self._end()

    def _end(self) -> None:
        """Ends the main thread wherever it waits, from another thread.

        A signal that arrives just before the main thread blocks does not wake it, so it is sent again; and where its
        exception was lost in a destructor, the empty line ends the waiting for messages.
        """
        while True:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)
            self._lines.put(b"")

    def _have(self, message: dict[str, Any]) -> None:
        """Answers which files are missing, and makes room for them."""
        missing = self.store.missing(message["sizes"])
        self.store.make_room(sum(message["sizes"][sha256] for sha256 in missing))
        self.send({"missing": missing})

    def _put(self, message: dict[str, Any]) -> None:
        """Receives a file."""
        try:
            self.store.make_room(message["size"])
            self.send({"go": True})
            self.store.take(_WatchedStream(self._source, self._heard), message["sha256"], message["size"])
        finally:
            self._body.release()
        self.send({"done": True})

    def _run(self, message: dict[str, Any]) -> None:
        """Runs a task on kept files, and keeps the files that it makes."""
        if message["keep"]:
            (self.work / KEEP).touch()
        # Give the task its input files under the names that it expects.
        for name, sha256 in message["hashes"].items():
            path = self._inside(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            self.store.give(sha256, path)
        # Remove what an earlier task wrote under the names of the outputs.
        outputs = {role: self._inside(name) for role, name in message["outputs"].items()}
        for path in outputs.values():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
        # Run it with paths inside the working folder.
        request = {
            **message["request"],
            "files": {role: str(self._inside(name)) for role, name in message["files"].items()},
            "outputs": {role: str(path) for role, path in outputs.items()},
        }
        answer = ask(TASKS, request, message["timeout"], lambda *state: self.send({"progress": state}))
        self.send({"answer": answer, "made": {role: self.store.add(path) for role, path in outputs.items()}})

    def _inside(self, name: str) -> Path:
        """Returns the path of a name in the working folder. Raises EngineError where it would be outside."""
        path = (self.work / name).resolve()
        if not path.is_relative_to(self.work.resolve()):
            raise EngineError(f"{name!r} is outside of the working folder", "This is a bug: please report it.")
        return path

    def _get(self, message: dict[str, Any]) -> None:
        """Sends a kept file."""
        with self.store.path(message["sha256"]).open("rb") as file, self._sending:
            self.send({"size": os.fstat(file.fileno()).st_size})
            shutil.copyfileobj(file, self._sink, CHUNK)
            self._sink.flush()

    def clean(self) -> None:
        """Removes the working folder, unless it is to be kept."""
        if not (self.work / KEEP).exists():
            shutil.rmtree(self.work, ignore_errors=True)


class _WatchedStream:
    """A stream that sets an event at every read: a long file over a slow network is a sign of life too."""

    def __init__(self, stream: BufferedReader, heard: threading.Event) -> None:
        self._stream, self._event = stream, heard

    def read(self, size: int) -> bytes:
        """Returns the bytes that have come, `size` at most; none at the end of the stream."""
        data = self._stream.read1(size)
        self._event.set()
        return data


def _working_folder(folder: Path) -> Path:
    """Makes a folder that is locked as long as this process lives; removes those whose process is gone."""
    works = folder / "work"
    works.mkdir(parents=True, exist_ok=True)
    for old in works.iterdir():
        with contextlib.suppress(OSError):  # in use, or another run removes it too
            if time.time() - old.stat().st_mtime < timing().fresh_seconds or (old / KEEP).exists():
                continue  # perhaps made a moment ago, and not locked yet
            with (old / LOCK).open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(old, ignore_errors=True)
    new = Path(tempfile.mkdtemp(dir=works))
    descriptor = os.open(new / LOCK, os.O_CREAT | os.O_WRONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)  # held until the process ends
    return new


def _ignore_signals(number: int = 0, frame: object = None) -> None:
    """Ignores further signals, so that nothing interrupts the cleaning up; a signal's number ends the process.

    The end of a connection may send several signals at once.
    """
    for end in ENDS:
        signal.signal(end, signal.SIG_IGN)
    if number:
        sys.exit(128 + number)


def main() -> int:
    """Serves until the workstation leaves, and returns the exit code.

    Whatever ends it, no task stays running, and no working folder is left that is not to be kept.
    """
    # Take the signals and the real standard output.
    for number in ENDS:
        signal.signal(number, _ignore_signals)
    signal.alarm(0)  # which the boot code set
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not enter the conversation
    agent = None
    # Serve; what cannot be an answer of the conversation is its last line.
    try:
        agent = Agent(sys.stdin.buffer, sink, cache_folder())
        agent.send({"protocol": PROTOCOL, "python": sys.version.split()[0], "work": str(agent.work)})
        agent.serve()
    except (ConnectionError, EOFError):
        return 1
    except OSError as error:
        with contextlib.suppress(OSError):
            sink.write(
                json.dumps(
                    {
                        "error": f"the device's folder {cache_folder()} cannot be used: {error}",
                        "remedy": "Free some space there, or make it writable for this user.",
                    }
                ).encode()
                + b"\n"
            )
            sink.flush()
        return EngineError.exit_code
    # Clean up, whichever way it ended.
    finally:
        try:
            _ignore_signals()
        finally:
            if agent is not None:
                agent.clean()
    return 0


if __name__ == "__main__":
    code = 1
    try:
        code = main()
    except SystemExit as end:
        code = end.code
    except Exception:  # a bug of edgeprune
        traceback.print_exc()
    # A thread that still reads would crash the interpreter at its ordinary end.
    os._exit(code)
