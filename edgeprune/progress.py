"""Progress of long work: bars on a terminal, calls of a function, or nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

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


@contextmanager
def rich_progress() -> Iterator[Progress]:
    """Bars on standard error with the stage's name, its share done and the time left.

    Where standard error is not a terminal, notes alone are written, one a line.
    """
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
    bars = Bars(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("elapsed"),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
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
            task = self.task
            return lambda: bars.advance(task)

        def track(self, name: str, done: int, total: int) -> None:
            if name != self.name:
                self.stage(name, total or None)
            bars.update(self.task, total=total or None, completed=done)

        def note(self, text: str) -> None:
            console.print(text, highlight=False, markup=False)

    with bars:
        yield Shown()
