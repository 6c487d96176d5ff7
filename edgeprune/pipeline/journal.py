"""The journal of a run: one line for the run, then one line, flushed, for each finished stage, each with its hash.

A stage's files are complete before its line is written; a run that was killed goes on after the last
line. One process at a time has the folder. It knows nothing about what the stages do.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgeprune import __version__
from edgeprune.errors import BusyError, InputError
from edgeprune.files import parse_json, printable, write_text, writing
from edgeprune.pipeline.ownership import (
    JOURNAL,
    LOCK,
    LOCK_MARK,
    MADE,
    REPLACED,
    SCRATCH,
    check_work,
    foreign_in_work,
    is_whole_stage,
    mark_stage,
    remove_ours,
)
from edgeprune.pipeline.store import Parts, Store

DIGEST = "sha256"  # of a line, in it
BESIDE = "all else"  # what the stages leave of the time of a run
ID = "run"  # in the first line, and in the manifest of the bundle that the run writes


class Journal:
    """The stages finished in `folder`, and their results (JSON values). id: of the run, however often it goes on.

    It holds the folder's lock until it is closed. store: of the stages that other runs share, whose `parts` say what
    they depend on; None: there are no such runs.
    """

    def __init__(self, folder: Path, run_id: str, finished: dict[str, dict[str, Any]], lock: int) -> None:
        self.folder, self.id = folder, run_id
        self.store: Store | None = None
        self._finished, self._lock = finished, lock
        self._begun, self._inner_seconds, self._own_seconds = time.monotonic(), 0.0, 0.0

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives the folder back to other runs; it stays as it is."""
        if self._lock >= 0:
            os.close(self._lock)
        self._lock = -1

    def remove(self) -> list[str]:
        """Removes the folder, whose run is over, and closes it. Returns the files that are kept: no run made them."""
        foreign = foreign_in_work(self.folder)
        with writing(self.folder):
            remove_ours(self.folder, foreign)
        self.close()
        return foreign

    @property
    def seconds(self) -> dict[str, float]:
        """Returns the wall time of each finished stage, without that of stages within it, in the order in which they
        ended; last what the run took beside them since it was opened. They add up to the run."""
        stages = {name: line["seconds"] for name, line in self._finished.items()}
        return {**stages, BESIDE: round(time.monotonic() - self._begun - self._own_seconds, 3)}

    @property
    def is_new(self) -> bool:
        """Returns whether no stage is finished: there is nothing to go on with."""
        return not self._finished

    def has(self, name: str) -> bool:
        return name in self._finished

    def stage(self, name: str, compute: Callable[[], Any], parts: Parts | None = None) -> Any:
        """Returns the recorded result of a stage, or computes and records it.

        Results pass through JSON either way, so that an unbroken and a resumed run see the same. parts: what a stage
        depends on that other runs may share.
        """
        if name not in self._finished:
            start, around, self._inner_seconds = time.monotonic(), self._inner_seconds, 0.0
            is_shared = self.store is not None and parts is not None
            result = self.store.value(name, parts, compute) if is_shared else compute()
            whole = time.monotonic() - start
            own, self._inner_seconds = whole - self._inner_seconds, around + whole
            self._own_seconds += own
            line = {"stage": name, "seconds": round(own, 3), "result": result}
            _append(self.folder / JOURNAL, line)
            self._finished[name] = json.loads(json.dumps(line))
        return self._finished[name]["result"]

    @property
    def scratch(self) -> Path:
        """Returns an empty folder for files of which nothing is kept."""
        folder = self.folder / SCRATCH
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    def state_folder(self, name: str) -> Path:
        """Returns the folder of a stage's state, from which it goes on where it was ended; the stage removes it."""
        folder = self.folder / name
        if not (folder / MADE).exists():
            folder.mkdir(exist_ok=True)
            mark_stage(folder, is_complete=False)
        return folder

    def folder_stage(self, name: str, fill: Callable[[Path], Any], parts: Parts | None = None) -> Path:
        """Returns the folder that a stage of that name fills: filled aside, renamed when complete. parts: as of
        `stage`."""
        target = self.folder / name
        temporary = target.with_name(target.name + ".part")

        def compute() -> None:
            for stale in (temporary, target):
                remove_ours(stale)
            temporary.mkdir(parents=True)
            try:
                with writing(temporary):
                    mark_stage(temporary, is_complete=False)
                    if self.store is not None and parts is not None:
                        self.store.fill(name, parts, temporary, fill)
                    else:
                        fill(temporary)
                    mark_stage(temporary, is_complete=True)
                    temporary.rename(target)
            except BaseException:
                with contextlib.suppress(OSError):
                    remove_ours(temporary)  # it may be what fills the disk
                raise

        if self.has(name) and not is_whole_stage(target):
            raise InputError(
                f"the files in {target} are not those of the stage, which was complete", "Start afresh with --force."
            )
        self.stage(name, compute)
        return target


def open_journal(folder: Path, run: dict[str, Any], resume: bool, force: bool) -> Journal:
    """Opens the journal of `run` in `folder`, for this process alone.

    run: what makes two runs the same. Raises InputError where another process has
    the folder, where it holds what is not ours, an unfinished run and neither resume nor force is given, or, with
    resume, another run than this: the message names the field.
    """
    run = json.loads(json.dumps({"edgeprune": __version__, **run}))
    lock = _lock(folder)
    try:
        return _open(folder, run, resume, force, lock)
    except BaseException:
        os.close(lock)
        raise


def _open(folder: Path, run: dict[str, Any], resume: bool, force: bool, lock: int) -> Journal:
    """Opens the journal in a folder that is locked."""
    path = folder / JOURNAL
    check_work(folder, force and not resume)
    lines = [] if force and not resume else _read(path)
    # An unfinished run goes on where it is the same in every field.
    if resume and lines:
        for field in sorted({*run, *lines[0]} - {ID}):
            if run.get(field) != lines[0].get(field):
                raise InputError(
                    f"{folder} belongs to another run: its {field} is {printable(repr(lines[0].get(field)))}, "
                    f"this one's is {printable(repr(run.get(field)))}",
                    "Give the same arguments to resume it, or start afresh with --force.",
                )
        return Journal(folder, lines[0][ID], {line["stage"]: line for line in lines[1:]}, lock)
    if lines:
        raise InputError(
            f"{folder} holds an unfinished run ({len(lines) - 1} stages done)",
            "Go on with --resume, or start afresh with --force.",
        )
    # A new run begins with an empty folder, and gives back the older bundle that the last one was about to replace.
    output = folder.with_name(folder.name.removesuffix(".work"))
    if (folder / REPLACED).is_dir() and not output.exists():
        (folder / REPLACED).rename(output)
    _empty(folder)
    run_id = uuid.uuid4().hex
    # The header is there as a whole or not at all: by it the folder is known as ours.
    write_text(path, _text_of({ID: run_id, **run}))
    return Journal(folder, run_id, {}, lock)


def _empty(folder: Path) -> None:
    """Removes all that runs made in a folder but its lock; the journal last, so that a kill leaves it ours."""
    foreign = foreign_in_work(folder)
    for path in sorted(folder.iterdir(), key=lambda path: path.name == JOURNAL):
        if path.is_dir() and not path.is_symlink():
            start = f"{path.name}/"
            remove_ours(path, [name.removeprefix(start) for name in foreign if name.startswith(start)])
        elif path.name != LOCK and path.name not in foreign:
            path.unlink()


def _lock(folder: Path) -> int:
    """Returns the descriptor of the lock of a folder, which is made where it is not there.

    Raises InputError, which names the process that has it.
    """
    check_work(folder, force=False)
    with writing(folder):
        while True:
            folder.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # the run that had it removed the folder
                descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
                if _is_locked(descriptor, folder):
                    return descriptor
                os.close(descriptor)


def _is_locked(descriptor: int, folder: Path) -> bool:
    """Returns whether the lock is ours now; False: it was removed meanwhile. Raises InputError where it is taken."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = printable(os.read(descriptor, 100).decode(errors="replace").removeprefix(LOCK_MARK), 40).strip()
        os.close(descriptor)
        raise BusyError(
            f"another run, process {holder or 'unknown'}, works in {folder}",
            "Wait until it ends, or name another directory with --output.",
        ) from None
    except OSError:
        pass  # a file system without locks
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(descriptor), (folder / LOCK).stat()):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{LOCK_MARK}{os.getpid()}\n".encode(), 0)
            return True
    return False


def _read(path: Path) -> list[dict[str, Any]]:
    """Reads all complete lines; the last one may be cut off by a kill and is then taken away.

    Raises InputError for a line that no journal has.
    """
    if not path.exists():
        return []
    data = path.read_bytes()
    complete = data[: data.rfind(b"\n") + 1]
    if len(complete) < len(data):
        with writing(path), path.open("r+b") as file:
            file.truncate(len(complete))
    remedy = "Start afresh with --force."
    lines = [
        parse_json(line, f"{path}, line {number},", dict, remedy)
        for number, line in enumerate(complete.splitlines(), 1)
    ]
    for number, line in enumerate(lines, 1):
        if line.pop(DIGEST, None) != _digest(line):
            raise InputError(f"{path}, line {number}, is damaged or not of a journal", remedy)
    return lines


def _digest(line: dict[str, Any]) -> str:
    """Returns the sha256 of a line without it: what stages read back is what they wrote."""
    return hashlib.sha256(json.dumps(line).encode()).hexdigest()


def _text_of(line: dict[str, Any]) -> str:
    return json.dumps({**line, DIGEST: _digest(line)}) + "\n"


def _append(path: Path, line: dict[str, Any]) -> None:
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.write(_text_of(line))
        file.flush()
        os.fsync(file.fileno())
