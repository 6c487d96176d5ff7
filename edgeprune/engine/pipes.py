"""The two ends of another process's pipes, read and written with a deadline and a bounded use of memory.

It does not know which process that is, nor what is said.
"""

from __future__ import annotations

import os
import select
import time
from io import RawIOBase

_PART = 1 << 16  # bytes that are read at once


class Late(Exception):
    """The other process did not read or write before the deadline."""


class Incoming:
    """The bytes that another process writes. Deadlines are times of time.monotonic()."""

    def __init__(self, stream: RawIOBase) -> None:
        self._stream, self._bytes, self._poll = stream, bytearray(), select.poll()
        self._poll.register(stream.fileno(), select.POLLIN)

    def line(self, most: int, until: float) -> bytes:
        """Returns the next line with its end; without one where the pipe ended, or after `most` bytes. Raises Late."""
        searched = 0
        while not (end := self._bytes.find(b"\n", searched) + 1):
            searched = len(self._bytes)
            if searched >= most or not self._fill(until):
                end = searched
                break
        return self._take(min(end, most))

    def some(self, most: int, until: float) -> bytes:
        """Returns the bytes that have come, `most` at most; none where the pipe ended. Raises Late."""
        if not self._bytes:
            self._fill(until)
        return self._take(most)

    def _fill(self, until: float) -> bool:
        """Waits for further bytes; returns whether there are any."""
        if not self._poll.poll(_milliseconds(until)):
            raise Late
        data = os.read(self._stream.fileno(), _PART)
        self._bytes += data
        return bool(data)

    def _take(self, size: int) -> bytes:
        taken = bytes(self._bytes[:size])
        del self._bytes[:size]
        return taken


class Outgoing:
    """The bytes that another process reads."""

    def __init__(self, stream: RawIOBase) -> None:
        self._stream, self._poll = stream, select.poll()
        os.set_blocking(stream.fileno(), False)
        self._poll.register(stream.fileno(), select.POLLOUT)

    def write(self, data: bytes, until: float) -> None:
        """Writes all bytes. Raises Late, OSError where nobody reads them, ValueError where the pipe is closed."""
        view = memoryview(data)
        while view:
            if not self._poll.poll(_milliseconds(until)):
                raise Late
            view = view[self._stream.write(view) or 0 :]  # None: another writer was faster


def _milliseconds(until: float) -> int:
    """Returns the time that is left, never below zero: poll takes that for no limit."""
    return max(0, round(1e3 * (until - time.monotonic())))
