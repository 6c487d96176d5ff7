"""Tasks in processes of their own: one JSON request in, progress and one JSON answer out, every failure reported.

This file also runs on the device: Python 3.10, standard library only. It does not know what the tasks do. A child
never outlives its parent: what kills the parent ends the child.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from typing import IO, Any

from edgeprune.errors import EdgepruneError, EngineError
from edgeprune.ondevice.lines import MOST_LINE, document_of, one_line

OnProgress = Callable[[str, int, int], None]
"""A progress callback, called with a stage, the steps done and the steps in all; 0 in all: unknown."""

# Linux sends SIGKILL to the child when its parent is gone. Whether it went before that was set up is checked once.
_START = """
import sys
sys.path[:] = {path!r}
import os, runpy
if sys.platform == "linux":
    import ctypes
    ctypes.CDLL(None).prctl(1, 9)
    if os.getppid() != {parent}:
        sys.exit(1)
runpy.run_module({module!r}, run_name="__main__", alter_sys=True)
"""
_LAST_WORDS = 300  # characters
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def quiet(stage: str, done: int, total: int) -> None:
    """Ignores the progress."""


def ask(
    module: str, request: dict[str, Any], timeout_seconds: float, on_progress: OnProgress = quiet
) -> dict[str, Any]:
    """Runs a module as a program on a request and returns its answer.

    The program imports from where this process does, not from the current folder. request["task"] names the work in
    messages. Raises EngineError where the child reports one, dies (with the signal and the last it wrote) or does
    not end in time; the child and its children are gone then.
    """
    # Start the child in a process group of its own, so that its children can be killed with it.
    start = _START.format(path=sys.path, module=module, parent=os.getpid())
    process = subprocess.Popen(
        [sys.executable, "-c", start],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )
    # Limit its time, and keep the end of its standard error.
    late = threading.Event()

    def end_late() -> None:
        late.set()
        end(process)

    timer = threading.Timer(timeout_seconds, end_late)
    last_words: deque[str] = deque(maxlen=_LAST_WORDS)
    listener = threading.Thread(target=_collect, args=(process.stderr, last_words), daemon=True)
    # Send the request, then pass the progress on until the child closes its output.
    try:
        timer.start()
        listener.start()
        with contextlib.suppress(BrokenPipeError):  # it died early: its exit code and standard error name the reason
            process.stdin.write(json.dumps(request))
            process.stdin.close()
        last = _listen(process.stdout, on_progress)
        process.wait()
        listener.join(timeout=5)
    finally:
        timer.cancel()
        end(process)
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        process.stdout.close()
    # Turn the way in which it ended into an answer or an error.
    if late.is_set():
        raise EngineError(
            f"{request['task']} did not end within {timeout_seconds:.0f} s",
            "Try a shorter context, or an idle machine.",
        )
    return _answer(request["task"], process.returncode, last, one_line("".join(last_words)))


def end(process: subprocess.Popen) -> None:
    """Kills a process that leads its own group, and the whole group with it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def serve(answer: Callable[[dict[str, Any], OnProgress], dict[str, Any]]) -> int:
    """Serves one request as the child: reads it, reports progress, writes the answer or the error.

    Returns the exit code. What libraries write to standard output goes to standard error meanwhile.
    """
    # Keep the real standard output for the answers alone.
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def send(document: dict[str, Any]) -> None:
        channel.write(json.dumps(document) + "\n")
        channel.flush()

    def on_progress(stage: str, done: int, total: int) -> None:
        send({"progress": [stage, done, total]})

    # Answer; errors that a user can act on become documents with a remedy.
    try:
        send(answer(json.load(sys.stdin), on_progress))
    except EdgepruneError as error:
        send({"error": error.message, "remedy": error.remedy})
        return error.exit_code
    except ModuleNotFoundError as error:
        name = (error.name or "").split(".")[0]
        send({"error": f"the Python module {name} is missing", "remedy": f"pip install {name}"})
        return EngineError.exit_code
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        where = f" at {error.filename}" if error.filename else ""
        send({"error": f"the disk is full{where}", "remedy": "Free some space there and try again."})
        return EngineError.exit_code
    return 0


def _listen(stream: IO[str], on_progress: OnProgress) -> dict[str, Any]:
    """Passes the progress on and returns the last document that is not progress; empty where there is none."""
    last: dict[str, Any] = {}
    for line in iter(lambda: stream.readline(MOST_LINE), ""):
        match document_of(line):
            case {"progress": [str(stage), int(done), int(total)]}:
                on_progress(stage, done, total)
            case {"progress": _}:
                pass
            case document if document:
                last = document
    return last


def _collect(stream: IO[str], characters: deque[str]) -> None:
    """Reads a stream to its end, of which the deque keeps the last characters."""
    for line in iter(lambda: stream.readline(MOST_LINE), ""):
        characters.extend(line)
    stream.close()


def _answer(task: str, code: int, answer: dict[str, Any], stderr: str) -> dict[str, Any]:
    """Returns the child's answer; raises EngineError where the child failed."""
    stderr = stderr or "it printed no reason"
    if code < 0:
        name = _signal_name(-code)
        hint = "The system may have run out of memory: try a smaller --batch or --context." if name == "SIGKILL" else ""
        raise EngineError(f"{task} was ended by {name}: {stderr}", hint or "Run `edgeprune doctor`.")
    if not answer:
        raise EngineError(f"{task} failed: {stderr}", "Run `edgeprune doctor`.")
    if "remedy" in answer:
        raise EngineError(str(answer.get("error")), str(answer["remedy"]))
    return answer


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # real-time signals have no name
        return f"signal {number}"
