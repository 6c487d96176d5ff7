"""The program `edgeprune`, and `python -m edgeprune.cli`. It imports the command line when a signal is no traceback."""

from __future__ import annotations

import contextlib
import os
import signal


def main() -> None:
    """Runs the command line."""
    # A file that is opened must not take the place of a standard stream that is closed.
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            with contextlib.suppress(OSError):
                os.open(os.devnull, os.O_RDWR)
    # Nothing is written before the command line is there: the first signal may end it at once.
    is_ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if not is_ignored:
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(128 + number))
    from edgeprune.cli.app import main as command_line

    try:
        command_line()
    finally:
        if not is_ignored:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    main()
