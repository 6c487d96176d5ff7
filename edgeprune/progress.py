"""Progress of long work: bars on a terminal, lines elsewhere, calls of a function, or nothing."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from edgeprune.log import log_event

LONG_SECONDS = 10.0  # a stage that has taken so long has a line for each tenth
ALIVE_SECONDS = 25.0  # after so long without a line there is one
BEAT_SECONDS = 1.0  # between two looks at that
PART_SECONDS = 1.0  # a part of a stage that took less has no line
MOST_BARS = 100  # the oldest goes: a device may tell of stages without end
OnProgress = Callable[[str, int, int], None]
"""on_progress(stage, done, total): how far a stage is; total 0 where that is unknown."""


class Progress(Protocol):
    def stage(self, name: str, total: int | None = None) -> Callable[[], None]:
        """Begins a stage of `total` steps (None: unknown); returns a function to call after each step."""

    def track(self, name: str, done: int, total: int) -> None:
        """Shows how far a stage is that counts its own steps; total 0: unknown."""

    def note(self, text: str) -> None:
        """Shows one line that the user should read now."""


class Silent:
    """Progress that nobody watches."""

    def stage(self, name: str, total: int | None = None) -> Callable[[], None]:
        return lambda: None

    def track(self, name: str, done: int, total: int) -> None:
        pass

    def note(self, text: str) -> None:
        pass


class Forwarded:
    """Progress that calls a function with each stage and its steps; notes go to the log."""

    def __init__(self, on_progress: OnProgress) -> None:
        self._tell = on_progress

    def stage(self, name: str, total: int | None = None) -> Callable[[], None]:
        done = 0

        def advance() -> None:
            nonlocal done
            done += 1
            self._tell(name, done, total or 0)

        self._tell(name, 0, total or 0)
        return advance

    def track(self, name: str, done: int, total: int) -> None:
        self._tell(name, done, total)

    def note(self, text: str) -> None:
        logging.getLogger("edgeprune").info("%s", text)


def progress_of(given: Progress | OnProgress | None) -> Progress:
    """Returns a Progress of what a caller gave: one already, a function to call, or nothing."""
    if given is None:
        return Silent()
    return given if hasattr(given, "stage") else Forwarded(given)


class Logged:
    """Progress that another one shows, with an event in the log for each stage that ended, with its seconds, and for
    each note."""

    def __init__(self, shown: Progress) -> None:
        self._shown, self._name, self._begun = shown, "", 0.0

    def stage(self, name: str, total: int | None = None) -> Callable[[], None]:
        self.end()
        self._name, self._begun = name, time.monotonic()
        log_event("begin", name, stage=name)
        return self._shown.stage(name, total)

    def track(self, name: str, done: int, total: int) -> None:
        self._shown.track(name, done, total)

    def note(self, text: str) -> None:
        log_event("note", text)
        self._shown.note(text)

    def end(self) -> None:
        """Logs the end of the stage that is under way, if any."""
        if self._name:
            log_event("stage", self._name, stage=self._name, seconds=round(time.monotonic() - self._begun, 3))
        self._name = ""


class Lines:
    """Progress as plain lines on standard error: one for each stage when it ends, more for a long one.

    A stage ends with its last step, or where the next one begins. What counts its own steps is a part of it, and has
    a line where it took a second or more. Where nothing was written for long, `beat` writes what is under way.
    """

    def __init__(self) -> None:
        self._written = time.monotonic()
        self._stage, self._part = _Line("", 0.0, self._write), _Line("", PART_SECONDS, self._write)

    def stage(self, name: str, total: int | None = None) -> Callable[[], None]:
        self.end()
        line = self._stage = _Line(name, 0.0, self._write)
        done = 0

        def advance() -> None:
            nonlocal done
            done += 1
            line.advanced(done, total or 0)
            if done == total:
                line.end()

        return advance

    def track(self, name: str, done: int, total: int) -> None:
        if name != self._part.name:
            self._part.end()
            self._part = _Line(name, PART_SECONDS, self._write)
        self._part.advanced(done, total)

    def note(self, text: str) -> None:
        self._write(text)

    def beat(self) -> None:
        """Writes what is under way, where nothing was written for ALIVE_SECONDS."""
        if time.monotonic() - self._written >= ALIVE_SECONDS:
            part, stage = self._part, self._stage
            self._write(part.under_way if part.name else stage.under_way)

    def _write(self, text: str) -> None:
        self._written = time.monotonic()
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()

    def end(self) -> None:
        """Writes the lines of what is under way."""
        self._part.end()
        self._stage.end()


class _Line:
    """A stage that is under way, of which a line is written when it ends after at least so many seconds."""

    def __init__(self, name: str, least_seconds: float, write: Callable[[str], None]) -> None:
        self.name = name
        self._least_seconds, self._write, self._begun = least_seconds, write, time.monotonic()
        self._done, self._total, self._tenth = 0, 0, 0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._begun

    @property
    def under_way(self) -> str:
        """Returns a sign of life, with the share that is done where it is known."""
        share = f"{100 * self._done // self._total} % after" if self._total else "under way for"
        return f"{self.name or 'this run'}: {share} {_duration(self.seconds)}"

    def advanced(self, done: int, total: int) -> None:
        """Writes a line where a long stage has reached its next tenth."""
        self._done, self._total = done, total
        tenth = 10 * done // total if total else 0
        if self.name and self._tenth < tenth < 10 and self.seconds >= LONG_SECONDS:
            self._write(f"{self.name}: {10 * tenth} % after {_duration(self.seconds)}")
            self._tenth = tenth

    def end(self) -> None:
        if self.name and self.seconds >= self._least_seconds:
            self._write(f"{self.name}: done in {_duration(self.seconds)}")
        self.name = ""


@contextmanager
def _beating(beat: Callable[[], None]) -> Iterator[None]:
    """Calls a function every BEAT_SECONDS from a thread of its own."""
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(BEAT_SECONDS):
            beat()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _duration(seconds: float) -> str:
    """Returns a duration in words: 0.4 s, 12 s, 3 min 20 s."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


@contextmanager
def rich_progress() -> Iterator[Progress]:
    """Bars on standard error with the stage's name, its share done and the time left; lines where it is no terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        SpinnerColumn,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    if not console.is_terminal:
        lines = Lines()
        with _beating(lines.beat):
            yield lines
        lines.end()
        return
    bars = Bars(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),  # a device's words
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("elapsed"),
        TimeElapsedColumn(),
        console=console,
    )

    # One bar for each stage; a stage is complete when the next one begins.
    class Shown:
        task: int | None = None
        name: str = ""

        def stage(self, name: str, total: int | None = None) -> Callable[[], None]:
            if self.task is not None:
                bars.update(self.task, total=1, completed=1)
                bars.stop_task(self.task)
            self.task, self.name = bars.add_task(name, total=total), name
            if len(bars.task_ids) > MOST_BARS:
                bars.remove_task(bars.task_ids[0])
            task = self.task
            return lambda: bars.advance(task) if task in bars.task_ids else None

        def track(self, name: str, done: int, total: int) -> None:
            if name != self.name:
                self.stage(name, total or None)
            bars.update(self.task, total=total or None, completed=done)

        def note(self, text: str) -> None:
            console.print(text, highlight=False, markup=False)

    with bars:
        yield Shown()
