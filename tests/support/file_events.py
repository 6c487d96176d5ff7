"""The file operations of this process, counted as Python announces them: a double of what stops a run at any of them.

An announcement comes before its operation. What libraries in other languages do to files is not announced.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

KINDS = ("os.rename", "os.link", "os.symlink", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

OnEvent = Callable[[str, str], None]
"""Called with the kind of an operation and the path that it changes."""


def watch(folder: Path, on_event: OnEvent) -> None:
    """Calls on_event before every operation that changes a file below folder, to the end of this process.

    An exception that it raises becomes the operation's.
    """
    below = f"{folder}{os.sep}"

    def hook(event: str, words: tuple[Any, ...]) -> None:
        if event not in KINDS and not (event == "open" and words[2] & WRITING):
            return
        name = words[1] if event == "os.symlink" else words[0]
        if isinstance(name, int):  # a file that was announced when it was opened
            return
        path = os.fsdecode(name)
        if path.startswith(below) or not Path(path).is_absolute():  # relative: to a folder that is being removed
            on_event("write" if event == "open" else event, path)

    sys.addaudithook(hook)


def at(number: int, kind: str | None, act: Callable[[str], None]) -> OnEvent:
    """Returns the callback that acts, with the path, at the operation of that number, from 0; kind: of this kind."""
    left = number

    def on_event(name: str, path: str) -> None:
        nonlocal left
        if kind in (None, name):
            left -= 1
            if left == -1:
                act(path)

    return on_event


def from_then_on(number: int, act: Callable[[str], None]) -> OnEvent:
    """Returns the callback that acts at the operation of that number and at all after it that need room."""
    left = number

    def on_event(name: str, path: str) -> None:
        nonlocal left
        left -= 1
        if left < 0 and name not in ("os.remove", "os.rmdir", "shutil.rmtree", "os.rename"):
            act(path)

    return on_event
