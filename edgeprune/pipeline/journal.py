"""The journal of a run: one line for the run, then one line, flushed, for each finished stage.

A stage's files are complete before its line is written; a run that was killed goes on after the last
line. It knows nothing about what the stages do.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgeprune.errors import InputError

FILE = "journal.jsonl"


class Journal:
    """The stages finished in `folder`, and their results (JSON values)."""

    def __init__(self, folder: Path, finished: dict[str, dict[str, Any]]) -> None:
        self.folder = folder
        self._finished = finished

    @property
    def seconds(self) -> dict[str, float]:
        """Returns the wall time of each finished stage, in the order in which they ended."""
        return {name: line["seconds"] for name, line in self._finished.items()}

    def has(self, name: str) -> bool:
        return name in self._finished

    def stage(self, name: str, compute: Callable[[], Any]) -> Any:
        """Returns the recorded result of a stage, or computes and records it.

        Results pass through JSON either way, so that an unbroken and a resumed run see the same.
        """
        if name not in self._finished:
            start = time.monotonic()
            result = compute()
            line = {"stage": name, "seconds": round(time.monotonic() - start, 3), "result": result}
            _append(self.folder / FILE, line)
            self._finished[name] = json.loads(json.dumps(line))
        return self._finished[name]["result"]

    def folder_stage(self, name: str, fill: Callable[[Path], Any]) -> Path:
        """Returns the folder that a stage of that name fills: filled aside, renamed when complete."""
        target = self.folder / name

        def compute() -> None:
            temporary = target.with_name(target.name + ".part")
            for stale in (temporary, target):
                shutil.rmtree(stale, ignore_errors=True)
            temporary.mkdir(parents=True)
            fill(temporary)
            temporary.rename(target)

        self.stage(name, compute)
        return target


def open_journal(folder: Path, run: dict[str, Any], resume: bool, force: bool) -> Journal:
    """Opens the journal of `run` in `folder`.

    Raises InputError where the folder holds an unfinished run and neither resume nor force is given,
    or, with resume, where its run differs: the message names the field.
    """
    path = folder / FILE
    run = json.loads(json.dumps(run))
    lines = _read(path)
    # An unfinished run goes on where it is the same in every field.
    if resume and lines:
        for field in sorted({*run, *lines[0]}):
            if run.get(field) != lines[0].get(field):
                raise InputError(
                    f"{folder} belongs to another run: its {field} is {lines[0].get(field)!r}, "
                    f"this one's is {run.get(field)!r}",
                    "Give the same arguments to resume it, or start afresh with --force.",
                )
        return Journal(folder, {line["stage"]: line for line in lines[1:]})
    if lines and not force:
        raise InputError(
            f"{folder} holds an unfinished run ({len(lines) - 1} stages done)",
            "Go on with --resume, or start afresh with --force.",
        )
    # A new run begins with an empty folder.
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _append(path, run)
    return Journal(folder, {})


def _read(path: Path) -> list[dict[str, Any]]:
    """Reads all complete lines; the last one may be cut off by a kill and is then taken away."""
    if not path.exists():
        return []
    data = path.read_bytes()
    complete = data[: data.rfind(b"\n") + 1]
    if len(complete) < len(data):
        with path.open("r+b") as file:
            file.truncate(len(complete))
    return [json.loads(line) for line in complete.splitlines()]


def _append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())
