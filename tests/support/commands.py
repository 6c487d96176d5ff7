"""The command line, in this process or in one of its own, with what it printed."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import subprocess
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgeprune.cli.app import main
from edgeprune.engine import probe
from edgeprune.pipeline import rates
from edgeprune.search import latency_table
from tests.support import ROOT
from tests.support.durations import durations

SHORT = ("--samples", "4", "--length", "32", "--prompt", "16", "--context", "64")
SMALL = (*SHORT, "--weights", "float,int8")  # each further format is built, timed and probed
FEW_POINTS = {
    "SHARES": (0.5,),
    "MIXES": 0,
    "MIXES_OF_A_FORMAT": 0,
}  # of the latency table: it is timed in seconds, and its fit is rough
SMALL_MATRICES = {"WIDTH": 512, "SMALLEST_READ": 2**24, "LARGEST_READ": 2**24}  # of the probe of this processor
SMALL_PROBES = {"ROWS": 64, "WIDTH": 128}  # of the rates that a duration is told by
PROGRAM = f"""
from edgeprune.pipeline import rates
from edgeprune.search import latency_table
vars(latency_table).update({FEW_POINTS})
vars(rates).update({SMALL_PROBES})
from edgeprune.cli.app import main
main()
"""


def run(*words: str | Path, cwd: Path | None = None, path: str | None = None) -> subprocess.CompletedProcess:
    """Runs the command line in this process: importing torch is most of what a short command takes.

    path: where ssh is. A bug's traceback stands in what was said, as it does in a process of its own.
    """
    output, errors = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
        contextlib.chdir(cwd or Path.cwd()),
        warnings.catch_warnings(),
        _log_as_before(),
    ):
        patch.setattr("sys.argv", ["edgeprune", *map(str, words)])
        patch.setenv("COLUMNS", "200")
        if path is not None:
            patch.setenv("PATH", path)
        for module, constants in ((latency_table, FEW_POINTS), (probe, SMALL_MATRICES), (rates, SMALL_PROBES)):
            for name, value in constants.items():
                patch.setattr(module, name, value)
        try:
            code = main()
        except SystemExit as ended:
            code = ended.code
        except Exception:
            traceback.print_exc()
            code = 1
    return subprocess.CompletedProcess(words, code or 0, output.getvalue(), errors.getvalue())


def run_alone(
    *words: str | Path, cwd: Path | None = None, python_path: str | Path = ROOT
) -> subprocess.CompletedProcess:
    """Runs the command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "edgeprune.cli.app", *map(str, words)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
        env=environment() | {"PYTHONPATH": str(python_path)},
    )


def begin(*words: str | Path, path: str | None = None, seconds: float = 0.3, **options: Any) -> subprocess.Popen:
    """Starts the command line in a process of its own, in which every measurement takes so long."""
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(path, measure_seconds=seconds),
        **options,
    )


def environment(path: str | None = None, **seconds: float) -> dict[str, str]:
    """Returns the environment of a process. path: where ssh is. seconds: other durations than this process's."""
    names = {"PYTHONPATH": str(ROOT), "PATH": path or os.environ["PATH"], "COLUMNS": "200"}
    return os.environ | names | durations(**seconds)


@contextlib.contextmanager
def _log_as_before() -> Iterator[None]:
    """Takes back what a command does to the log of its process."""
    loggers = [logging.getLogger(), logging.getLogger("edgeprune")]
    before = [(logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    try:
        yield
    finally:
        logging.captureWarnings(False)
        for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
            logger.handlers[:], logger.propagate = handlers, propagate
            logger.setLevel(level)
