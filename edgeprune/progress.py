"""How long work tells how far it is; where nobody watches, nothing is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    def stage(self, name: str, total: int | None = None) -> Callable[[], None]:
        """Begin a stage of `total` steps (None: unknown); the result is called after each step."""

    def note(self, text: str) -> None:
        """Say one thing that the user should know now."""


class Silent:
    """Tells nobody."""

    def stage(self, name: str, total: int | None = None) -> Callable[[], None]:
        return lambda: None

    def note(self, text: str) -> None:
        pass


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
    from rich.progress import (
        Progress as Bars,
    )

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

    class Shown:
        task: int | None = None

        def stage(self, name: str, total: int | None = None) -> Callable[[], None]:
            if self.task is not None:
                bars.update(self.task, total=1, completed=1)
                bars.stop_task(self.task)
            self.task = task = bars.add_task(name, total=total)
            return lambda: bars.advance(task)

        def note(self, text: str) -> None:
            console.print(text, highlight=False, markup=False)

    with bars:
        yield Shown()
