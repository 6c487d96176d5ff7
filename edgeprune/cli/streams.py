"""Standard output and standard error of the command line: what cannot be written there is no traceback.

It knows no command.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from errno import EBADF
from pathlib import Path
from typing import Any, TextIO

import typer

from edgeprune.files import WriteError, printable

BROKEN_PIPE = 141  # as of a program that SIGPIPE ended
LEAST_WIDTH = 80  # columns: a table that is narrower loses digits
LONGEST = 4000  # characters of a line on standard error


@contextlib.contextmanager
def guarded_streams() -> Iterator[None]:
    """Guards both streams: characters that they cannot hold are escaped, and a failed write is one error of ours."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Output(sys.stdout), _Errors(sys.stderr)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class _Guarded:
    """A stream that may be closed, full, or of few characters."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def isatty(self) -> bool:
        return self._stream is not None and self._stream.isatty()

    def write(self, text: str) -> int:
        try:
            if self._stream is None:
                raise OSError(EBADF, os.strerror(EBADF))
            return self._stream.write(text)
        except OSError as error:
            return self._failed(error, text)

    def flush(self) -> None:
        try:
            if self._stream is not None:
                self._stream.flush()
        except OSError as error:
            self._failed(error, "")

    def _failed(self, error: OSError, text: str) -> int:
        raise NotImplementedError


class _Errors(_Guarded):
    """Standard error: what cannot be written there is left out."""

    def _failed(self, error: OSError, text: str) -> int:
        return len(text)


class _Output(_Guarded):
    """Standard output: what cannot be written there ends the command."""

    def _failed(self, error: OSError, text: str) -> int:
        """Raises Exit where nobody reads any more, else WriteError."""
        # What is still buffered goes nowhere, else Python complains once more when it ends.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        if isinstance(error, BrokenPipeError):
            raise typer.Exit(BROKEN_PIPE) from None
        raise WriteError(
            f"cannot write standard output: {error.strerror}",
            "Send it to a file on a disk with room, or to a terminal.",
        ) from None


def console() -> Any:
    """Returns the console of rich on standard output; lines of a narrower terminal are broken by itself, not cut."""
    from rich.console import Console

    console = Console()
    console.width = max(console.width, LEAST_WIDTH)
    return console


def show(text: str) -> None:
    """Writes a line to standard output."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def note(text: str) -> None:
    """Writes a line to standard error, apart from what a command returns."""
    sys.stderr.write(f"{printable(text, LONGEST)}\n")
    sys.stderr.flush()


@contextlib.contextmanager
def made(kind: str, path: Path) -> Iterator[None]:
    """Names what a command made on standard error, where standard output cannot be written within it."""
    try:
        yield
    except (WriteError, typer.Exit):
        note(f"{kind}  {path} is complete")
        raise
