"""A device behind ssh that runs tasks: the program for it, and the files that go there and come back.

It does not know the tasks. ssh is the system's, with the user's config, keys and known_hosts, and nothing is installed
on the device. The device needs python3 (3.10) and what the task needs (numpy, TensorRT and a CUDA module, or
onnxruntime). The program that runs there is packed at run time from the files that run on this machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import distribution
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

from edgeprune import __version__
from edgeprune.engine.answers import REMEDY, Left, Missing, Ran, Size, read_answer
from edgeprune.engine.ssh import Talk, Target, talking
from edgeprune.errors import BadAnswer, EngineError, InputError
from edgeprune.files import held
from edgeprune.ondevice.agent import CHUNK
from edgeprune.ondevice.durations import timing
from edgeprune.ondevice.worker import OnProgress

GROUND = (
    "__init__.py",
    "errors.py",
    "files.py",
    "cache.py",
    "chats.py",
    "dialects.py",
    "precision.py",
)  # the files that travel beside the folder ondevice/
BOOT = """
import sys
sys.path[:] = [entry for entry in sys.path if entry]  # a user's own json.py must not stand for the library
import json, os, runpy, signal
print(flush=True)  # what the login shell wrote may have no end of line
if sys.version_info < (3, 10):
    print(json.dumps({"error": "the device has Python %d.%d" % sys.version_info[:2],
                      "remedy": "Install Python 3.10 or newer there, as python3."}))
    sys.exit(4)
signal.alarm(120)  # a workstation that goes away now leaves nothing that waits
os.environ.setdefault("EDGEPRUNE_CACHE", os.path.expanduser("~/.cache/edgeprune-device"))
folder = os.environ["EDGEPRUNE_CACHE"]
size, name = sys.stdin.buffer.readline().decode().split()
program = sys.stdin.buffer.read(int(size))
if len(program) < int(size):
    sys.exit(1)
path = os.path.join(folder, name)
try:
    os.makedirs(folder, mode=0o700, exist_ok=True)
    with open(path + ".%d" % os.getpid(), "wb") as file:
        file.write(program)
    os.replace(file.name, path)
except OSError as error:
    try:
        os.unlink(path + ".%d" % os.getpid())
    except OSError:
        pass
    print(json.dumps({"error": "the device's folder %s cannot be written: %s" % (folder, error.strerror),
                      "remedy": "Free some space there, or make it writable for this user."}))
    sys.exit(4)
sys.path.insert(0, path)
runpy.run_module("edgeprune.ondevice.agent", run_name="__main__", alter_sys=True)
"""
# What finish.pyz and serve.pyz check before they import the rest.
MAIN = """
import sys
from importlib.util import find_spec

if sys.version_info < (3, 10):
    sys.stderr.write("error: this is Python %%d.%%d\\nInstall Python 3.10 or newer.\\n" %% sys.version_info[:2])
    sys.exit(4)
for name in %r:
    if find_spec(name) is None:
        sys.stderr.write("error: this machine has no Python module %%s\\npip install %%s\\n" %% (name, name))
        sys.exit(4)
from edgeprune.ondevice.%s import main

sys.exit(main())
"""
TEMPLATES = ("jinja2", "markupsafe")  # the packages that render chat templates, which serve.pyz brings along


def device_files() -> list[str]:
    """Returns the paths below the package of all files that travel to a device."""
    folder = package_files("edgeprune").joinpath("ondevice")
    return [*GROUND, *sorted(f"ondevice/{file.name}" for file in folder.iterdir() if file.name.endswith(".py"))]


def program() -> bytes:
    """Returns the device's files as one zip, which is the bundle's `finish.pyz`, and the agent for the boot code."""
    return _packed({"__main__.py": MAIN % (("numpy",), "finish")})


def service_program() -> bytes:
    """Returns the device's files and a renderer of chat templates as one zip, which is the bundle's `serve.pyz`."""
    files = {"__main__.py": MAIN % (("numpy", "tokenizers"), "serve")}
    for package in TEMPLATES:
        files |= {
            f"{package}/{file.name}": file.read_text(encoding="utf-8")
            for file in package_files(package).iterdir()
            if file.name.endswith(".py")
        }
        for path in distribution(package).files or ():
            if path.name.upper().startswith("LICENSE"):
                files[f"licenses/{package}.txt"] = path.read_text(encoding="utf-8")
    return _packed(files)


def _packed(more: Mapping[str, str]) -> bytes:
    """Returns the device's files and more of them as one zip, the same at every time and on every machine."""
    root = package_files("edgeprune")
    files = {f"edgeprune/{name}": root.joinpath(name).read_text(encoding="utf-8") for name in device_files()}
    metadata = f"Metadata-Version: 2.1\nName: edgeprune\nVersion: {__version__}\n"
    files |= {f"edgeprune-{__version__}.dist-info/METADATA": metadata} | dict(sorted(more.items()))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0)), text, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


@dataclass(frozen=True)
class Device:
    """A device behind ssh, as a session that runs tasks.

    Each task has a connection of its own, so that none is held open while this machine prunes. keep: leave the working
    folder on the device. serves: send along what renders chat templates. queue: a folder of locks, in which a task
    waits for the device's own, so that runs that share the folder measure one after the other.
    """

    target: Target
    keep: bool = False
    serves: bool = False
    queue: Path | None = None

    def __str__(self) -> str:
        return str(self.target)

    def run(self, request: dict[str, Any], timeout_seconds: float, on_progress: OnProgress) -> dict[str, Any]:
        """Sends the files that the device does not have, runs a task, fetches its outputs, and returns its answer.

        Raises EngineError where the device cannot be reached, the connection is lost, the disk is full, or the task
        fails.
        """
        if self.queue is None:
            return self._run(request, timeout_seconds, on_progress)
        self.queue.mkdir(parents=True, exist_ok=True)
        with held(self.queue / f"device-{hashlib.sha256(str(self.target).encode()).hexdigest()}"):
            return self._run(request, timeout_seconds, on_progress)

    def _run(self, request: dict[str, Any], timeout_seconds: float, on_progress: OnProgress) -> dict[str, Any]:
        names = _names({role: Path(path) for role, path in request.get("files", {}).items()})
        outputs = {role: Path(path) for role, path in request.get("outputs", {}).items()}
        with talking(self.target, _first_words(service_program() if self.serves else program())) as talk:
            try:
                # Send the files and the request.
                hashes = _send_files(talk, names, on_progress)
                roles = {role: _relative(role, Path(path)) for role, path in request.get("files", {}).items()}
                talk.say(
                    {
                        "do": "run",
                        "request": request,
                        "files": roles,
                        "hashes": hashes,
                        "timeout": timeout_seconds,
                        "outputs": {role: f"out/{path.name}" for role, path in outputs.items()},
                        "keep": self.keep,
                    }
                )
                # Wait for the answer, and fetch the outputs.
                ran = talk.hear(Ran, timeout_seconds + timing().grace_seconds, on_progress)
                answer = read_answer(request, ran.answer, str(self.target))
                if set(ran.made) != set(outputs):
                    raise BadAnswer(f"{self.target} made other files than were asked for", REMEDY)
                for role, path in outputs.items():
                    _fetch(talk, ran.made[role], path, on_progress)
                # End the agent, which removes its working folder.
                talk.say({"do": "bye"})
                left = talk.hear(Left).left
            except EngineError as error:
                if self.keep:
                    error.remedy += f" Its working folder there is {talk.work}"
                raise
            if left is not None:
                logging.getLogger(__name__).warning("left on %s: %s", self.target, left)
        return answer


def _first_words(packed: bytes) -> Iterator[bytes]:
    """Yields the boot code and a program, each after a line with its length."""
    boot = BOOT.encode()
    name = f"agent-{hashlib.sha256(packed).hexdigest()[:16]}.pyz"
    yield from (f"{len(boot)}\n".encode(), boot, f"{len(packed)} {name}\n".encode(), packed)


def _names(files: dict[str, Path]) -> dict[str, Path]:
    """Returns all files that the device needs, by their names there: of a graph its data files too."""
    names = {}
    for role, path in files.items():
        names[_relative(role, path)] = path
        if path.suffix == ".onnx":
            names.update({_relative(role, data): data for data in path.parent.glob("*.data")})
    return names


def _relative(role: str, path: Path) -> str:
    return f"{role}/{path.name}"


def _send_files(talk: Talk, names: dict[str, Path], on_progress: OnProgress) -> dict[str, str]:
    """Sends the files that the device does not have; returns the SHA-256 of all files by name.

    Raises EngineError for a file that cannot be read.
    """
    # Hash the files, and ask which of them are missing.
    hashes, sizes = {}, {}
    for name, path in names.items():
        try:
            with path.open("rb") as file:
                hashes[name] = hashlib.file_digest(file, "sha256").hexdigest()
                sizes[hashes[name]] = file.tell()
        except OSError as error:
            raise EngineError(f"{path} cannot be read: {error.strerror}", "Export the model again.") from None
    talk.say({"do": "have", "sizes": sizes})
    missing = talk.hear(Missing).missing
    # Send these, one after the other.
    sources = {sha256: names[name] for name, sha256 in hashes.items() if sha256 in missing}
    total, sent = sum(sizes[sha256] for sha256 in sources), 0
    for sha256, path in sources.items():

        def body(path: Path, left: int) -> Iterator[bytes]:
            """Yields a file in chunks, and reports the progress."""
            nonlocal sent
            with path.open("rb") as file:
                while left:
                    chunk = file.read(min(CHUNK, left))
                    if not chunk:
                        raise EngineError(
                            f"{path} became shorter while it was sent", "Do not change it, and try again."
                        )
                    yield chunk
                    left -= len(chunk)
                    sent += len(chunk)
                    on_progress("send to the device", sent, total)

        talk.put(sha256, sizes[sha256], body(path, sizes[sha256]))
    return hashes


def _fetch(talk: Talk, sha256: str, path: Path, on_progress: OnProgress) -> None:
    """Fetches a file; raises EngineError where it arrives damaged or cannot be written."""
    talk.say({"do": "get", "sha256": sha256})
    size = talk.hear(Size).size
    temporary, digest, fetched = path.with_name(f"{path.name}.part"), hashlib.sha256(), 0
    try:
        free = shutil.disk_usage(path.parent).free
        if size > free:
            raise EngineError(
                f"the device sends {size / 2**20:.0f} MiB, and {path.parent} has {free / 2**20:.0f} MiB free",
                "Free some space on this machine and try again.",
            )
        with temporary.open("wb") as file:
            for chunk in talk.take(size):
                file.write(chunk)
                digest.update(chunk)
                fetched += len(chunk)
                on_progress("fetch from the device", fetched, size)
        if digest.hexdigest() != sha256:
            raise EngineError(f"{path.name} arrived damaged", "Try again; if it persists, check the network.")
        temporary.replace(path)
    except OSError as error:
        raise EngineError(
            f"{path} cannot be written: {error.strerror}", "Free some space on this machine and try again."
        ) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def target_of(text: str | None, keep: bool, queue: Path | None = None) -> Device | None:
    """Returns the device behind `ssh://...`, None for this machine. queue: as of Device. Raises InputError for a
    malformed address."""
    if text is None and keep:
        raise InputError("--keep-remote is given without --target", "Give --target ssh://USER@DEVICE, or leave it out.")
    return None if text is None else Device(Target.parse(text), keep, queue=queue)
