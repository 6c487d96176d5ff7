"""Runs of the command line for tools/campaign.py, forked from this process, which has imported all that they import."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import os
import pkgutil
import resource
import selectors
import signal
import sys
import time
import traceback
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import edgeprune
from edgeprune.cli.app import main

MOST_SECONDS = 90.0  # of a run
MOST_BYTES = 6 << 30  # of address space, beyond what this process has
MOST_FILE = 1 << 30
KEPT = 1 << 20  # bytes of each output
LIBRARIES = ("scipy.optimize", "matplotlib.figure", "jinja2", "gguf", "onnx", "tokenizers", "PIL.Image")
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER: what a run leaves behind becomes a child of this process
LEFT_SECONDS = 5.0  # until what a run started has to be gone


@dataclass(frozen=True)
class Ended:
    """A run that is over. code: negative for a signal, None for a run that was ended because it took too long."""

    words: tuple[str, ...]
    code: int | None
    output: str
    errors: str
    written: int = field(default=0)  # bytes of both
    seconds: float = field(default=0.0)
    left: tuple[str, ...] = field(default=())  # command lines of processes that outlived it


@dataclass(frozen=True)
class Signal:
    """A signal that a run gets after a while. whole: its children get it too, as from a terminal."""

    number: signal.Signals
    seconds: float
    whole: bool = False


class Runs:
    """Runs the command line. program: the command line's main; a double in tests."""

    def __init__(self, program: Callable[[], None] = main) -> None:
        self.program = program

    @staticmethod
    def import_all() -> None:
        """Imports all that a run would import, so that none has to."""
        for module in pkgutil.walk_packages(edgeprune.__path__, "edgeprune."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
        for name in LIBRARIES:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
        import torch
        from tqdm import tqdm

        torch.set_num_threads(1)  # a fork has one thread
        tqdm.monitor_interval = 0
        gc.freeze()  # a fork that looks at every object copies every page

    def run(
        self,
        words: Sequence[object],
        folder: Path,
        variables: Mapping[str, str] | None = None,
        before: Callable[[], None] = lambda: None,
        kill: Signal | None = None,
        seconds: float = MOST_SECONDS,
    ) -> Ended:
        """Returns a run of these words in a folder, when it and all that it started is over.

        before: called in its process before all else.
        """
        texts = tuple(map(str, words))
        pipes = os.pipe(), os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        others = _children()
        ctypes.CDLL(None).prctl(_SUBREAPER, 1)
        # A signal that comes before the program has begun, or after it, is not the program's.
        before_mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        start = time.monotonic()
        if (process := os.fork()) == 0:
            self._become(texts, folder, variables or {}, before, [writing for _, writing in pipes])
        signal.pthread_sigmask(signal.SIG_SETMASK, before_mask)
        for _, writing in pipes:
            os.close(writing)
        code, outputs = _followed(process, [reading for reading, _ in pipes], start, kill, seconds)
        for reading, _ in pipes:
            os.close(reading)
        output, errors = (bytes(data[:KEPT]).decode("utf-8", "replace") for data in outputs)
        seconds = time.monotonic() - start
        left = _left_behind(others)
        ctypes.CDLL(None).prctl(_SUBREAPER, 0)
        return Ended(texts, code, output, errors, sum(map(len, outputs)), seconds, left)

    def _become(
        self,
        words: tuple[str, ...],
        folder: Path,
        variables: Mapping[str, str],
        before: Callable[[], None],
        outputs: Sequence[int],
    ) -> None:
        """Becomes the run in this process, and ends it."""
        code = 1
        # What this process is to do at its end is the caller's: its temporary folders go when it ends itself.
        atexit._clear()
        weakref.finalize._registry.clear()
        weakref.finalize._registered_with_atexit = False
        try:
            os.setsid()
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for number, output in enumerate(outputs, 1):
                os.dup2(output, number)
            sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8") for number in (1, 2))  # noqa: PTH123, SIM115
            os.chdir(folder)
            os.environ.update(variables)
            sys.argv = ["edgeprune", *words]
            _limit()
            before()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            self.program()
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            with contextlib.suppress(BaseException):
                atexit._run_exitfuncs()
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)


def _limit() -> None:
    """Limits the memory and the files of this process, so that a fault does not take the machine's."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MOST_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MOST_FILE, resource.RLIM_INFINITY))


def _followed(
    process: int, readings: Sequence[int], start: float, kill: Signal | None, seconds: float
) -> tuple[int | None, list[bytearray]]:
    """Returns the exit code of a process and what it wrote. It gets its signal, and is ended when its time is over."""
    outputs, is_late, status = [bytearray(), bytearray()], False, None
    with selectors.DefaultSelector() as selector:
        for reading, output in zip(readings, outputs, strict=True):
            os.set_blocking(reading, False)
            selector.register(reading, selectors.EVENT_READ, output)
        while True:
            passed = time.monotonic() - start
            if kill is not None and passed >= kill.seconds and status is None:
                with contextlib.suppress(ProcessLookupError):  # the child is not yet a group of its own: tried again
                    (os.killpg if kill.whole else os.kill)(process, kill.number)
                    kill = None
            if passed >= seconds and not is_late:
                is_late = True
                os.killpg(process, signal.SIGKILL)
            wait = 0.05 if kill is None else min(0.05, max(0.0, kill.seconds - passed))
            ready = selector.select(0 if status is not None else wait)
            for key, _ in ready:
                if data := os.read(key.fd, 1 << 16):
                    key.data.extend(data)
                else:
                    selector.unregister(key.fd)
            if status is not None and not ready:
                return None if is_late else os.waitstatus_to_exitcode(status), outputs
            if status is None and (ended := os.waitpid(process, os.WNOHANG))[0]:
                status = ended[1]


def _children() -> set[str]:
    """Returns the ids of the children of this process."""
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


def _left_behind(others: set[str]) -> tuple[str, ...]:
    """Returns the command lines of the processes that a run left, which are ended; most end by themselves at once.

    others: children that this process had before.
    """
    deadline = time.monotonic() + LEFT_SECONDS
    left: dict[str, str] = {}
    while children := _children() - others:
        for child in children:
            if time.monotonic() > deadline and child not in left:
                with contextlib.suppress(OSError):
                    left[child] = Path(f"/proc/{child}/cmdline").read_text().replace("\0", " ").strip()[:200]
                    os.kill(int(child), signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(int(child), os.WNOHANG)
        time.sleep(0.01)
    return tuple(left.values())
