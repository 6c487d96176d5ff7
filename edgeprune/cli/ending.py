"""The signals that end a command: each is an interrupt that cleans up, and one line on standard error.

It knows no command.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from edgeprune.progress import Logged, Progress, rich_progress

ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Ending:
    """The signal that came, if any, and whether the command can go on where it was."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.can_resume = False

    @property
    def exit_code(self) -> int:
        return 128 + (self.signal or signal.SIGINT)

    @property
    def message(self) -> str:
        how = "interrupted" if self.signal in (None, signal.SIGINT) else f"ended by {signal.Signals(self.signal).name}"
        return f"{how}: the same command goes on with --resume" if self.can_resume else how


ending = Ending()  # of the command that this process runs


@contextlib.contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """Turns signals that end a process into KeyboardInterrupt, but those that the process is to ignore."""
    ending.__init__()

    def interrupt(number: int, frame: FrameType | None) -> None:
        ending.signal = number
        raise KeyboardInterrupt

    def send(number: int) -> None:
        """Sends a real signal, which ends a wait of the main thread as well."""
        if signal.getsignal(number) is interrupt:
            signal.pthread_kill(threading.main_thread().ident, number)

    def again(ignored: sys.UnraisableHookArgs) -> None:
        """Sends the signal once more where Python ignored the interrupt, as it does in __del__."""
        if isinstance(ignored.exc_value, KeyboardInterrupt):
            threading.Timer(0.05, send, (ending.signal,)).start()
        else:
            hook(ignored)

    hook, sys.unraisablehook = sys.unraisablehook, again
    before = {number: signal.getsignal(number) for number in ENDS}
    before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def resumable() -> Iterator[None]:
    """Marks the part of a command that --resume goes on with."""
    ending.can_resume = True
    yield
    ending.can_resume = False


class _Watched:
    """A progress that ends the command at its next stage or note where a library swallowed the interrupt."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def __getattr__(self, name: str) -> Any:
        if ending.signal is not None:
            raise KeyboardInterrupt
        return getattr(self._progress, name)


@contextlib.contextmanager
def shown_progress() -> Iterator[Progress]:
    """Shows the progress of a command, which ends at a signal whatever a library made of it."""
    with rich_progress() as progress:
        logged = Logged(progress)
        try:
            yield _Watched(logged)
        finally:
            logged.end()
