"""The measurements of llama.cpp's own program llama-bench.

This file also runs on the device: Python 3.10, standard library and numpy. It knows no model. The program runs with its
own defaults for threads, batches, cache and GPU, each time in a process of its own; several models take turns.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.errors import EngineError
from edgeprune.ondevice.figures import Workload
from edgeprune.ondevice.lines import one_line
from edgeprune.ondevice.llama_tools import REMEDY
from edgeprune.ondevice.machine import used_memory
from edgeprune.ondevice.runtimes import LLAMA_BENCH
from edgeprune.ondevice.timing import Timings, described

STEPS = 16  # tokens that are generated in a measurement of decode; they end at the workload's context
REPETITIONS = 3  # of each measurement in one process
LEAST_ROUNDS = 3  # of all models in turn
PRECISE = 0.01  # half width of a ratio's interval at which no further round is needed
_RUN_SECONDS, _LOOK_SECONDS = 900.0, 0.002


def measure_latency(files: dict[str, Path], workload: Workload, seconds: float) -> dict[str, Any]:
    """Times prefill and decode of files by name, in turn; returns what onnxruntime.measure_latency does.

    Also the `device` as the program names it. Decode is the mean of the last STEPS tokens of the context.
    """
    latency: dict[str, Any] = {}
    for kind in ("decode", "prefill"):
        runs = {name: run_of(path, workload, kind) for name, path in files.items()}
        timings, latency["device"] = _in_turn(runs, seconds / 2)
        latency[kind] = described(timings, list(files))
    return latency


def _in_turn(
    runs: dict[str, Callable[[], tuple[list[float], str]]], seconds: float, clock: Callable[[], float] = time.monotonic
) -> tuple[Timings, str]:
    """Returns the ms of all runs, a block for each round, and the device; the order is reversed every round."""
    blocks: dict[str, list[list[float]]] = {name: [] for name in runs}
    names, begin = list(runs), clock()
    while True:
        for name in names:
            block, device = runs[name]()
            blocks[name].append(block)
        names.reverse()
        timings = Timings({name: np.array(times) for name, times in blocks.items()})
        first, *others = blocks
        if len(blocks[first]) >= LEAST_ROUNDS and (
            clock() - begin >= seconds
            or all(timings.ratio(name, first).relative_half_width < PRECISE for name in others)
        ):
            return timings, device


def run_of(
    path: Path, workload: Workload, kind: str, threads: int | None = None
) -> Callable[[], tuple[list[float], str]]:
    """Returns a run of the program, which returns the ms of its repetitions, and the device.

    threads: None for as many as the program takes by itself.
    """
    steps = min(STEPS, workload.context - 1)
    sizes = {"prefill": (workload.prompt, 0, 0), "decode": (0, steps, workload.context - steps)}[kind]

    def run() -> tuple[list[float], str]:
        own = ["-t", str(threads)] if threads else []
        test = _test(_answer_of([*_started(path, *sizes), *own]), sizes)
        return [1e-6 * ns / (sizes[1] or 1) for ns in test["samples_ns"]], test["gpu_info"] or test["cpu_info"]

    return run


def _started(path: Path, prompt: int, generated: int, depth: int) -> list[str]:
    """Returns the command that measures a prompt or generated tokens behind so many others."""
    sizes = {"-p": prompt, "-n": generated, "-d": depth, "-r": REPETITIONS}
    return [LLAMA_BENCH, "-m", str(path), *(str(word) for pair in sizes.items() for word in pair), "-o", "json"]


def _answer_of(command: list[str], look: Callable[[int], object] = lambda process: None) -> str:
    """Returns what the program prints; look: called with its process number as long as it runs. Raises EngineError."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors)
        except OSError as error:
            raise EngineError(f"{LLAMA_BENCH} does not start: {error.strerror}", REMEDY) from None
        begin = time.monotonic()
        try:
            while process.poll() is None:
                look(process.pid)
                time.sleep(_LOOK_SECONDS)
                if time.monotonic() - begin > _RUN_SECONDS:
                    raise EngineError(
                        f"{LLAMA_BENCH} did not end within {_RUN_SECONDS:.0f} s", "Try a shorter --context."
                    )
        finally:
            process.kill()
            process.wait()
        output.seek(0)
        errors.seek(0)
        if process.returncode:
            reason = one_line(errors.read()[-600:].decode(errors="replace")) or "it printed no reason"
            raise EngineError(
                f"{LLAMA_BENCH} failed: {reason}", "Run it by hand on the device; update llama.cpp there."
            )
        return output.read().decode(errors="replace")


def _test(text: str, sizes: tuple[int, int, int]) -> dict[str, Any]:
    """Returns the one test that the program printed. Raises EngineError for anything else than was asked for."""
    try:
        (test,) = json.loads(text)
        samples = test["samples_ns"]
        found = test["n_prompt"], test["n_gen"], test["n_depth"]
        if found != sizes or len(samples) != REPETITIONS or not all(float(ns) > 0 for ns in samples):
            raise ValueError("it measured something else")
        return {**test, **{name: str(test.get(name, "")) for name in ("gpu_info", "cpu_info")}}
    except (ValueError, KeyError, TypeError) as error:
        raise EngineError(f"{LLAMA_BENCH} answers what cannot be: {one_line(str(error))}", REMEDY) from None


def measure_memory(path: Path, workload: Workload) -> dict[str, int]:
    """Returns the peak bytes of the program before a model is loaded, and over a prefill and some steps.

    On a processor they are the resident bytes of its process; on a GPU those by which the device's used memory grows.
    """
    before = used_memory() or 0
    baseline, _ = _peaks([LLAMA_BENCH, "-m", str(path.with_name("no model")), "-r", "1"], before, fails=True)
    steps = min(STEPS, workload.context - 1)
    sizes = 0, steps, workload.context - steps
    peak, text = _peaks(_started(path, *sizes), before)
    index = 1 if _test(text, sizes)["gpu_info"] else 0
    return {"baseline": min(baseline[index], peak[index]), "peak": peak[index]}


def _peaks(command: list[str], before: int, fails: bool = False) -> tuple[tuple[int, int], str]:
    """Returns the peaks of a process, resident and of the device's memory beyond `before`, and what it printed."""
    resident, used, looked = 0, 0, 0.0

    def look(process: int) -> None:
        nonlocal resident, used, looked
        resident = max(resident, _peak_of(process))
        if time.monotonic() - looked > 0.1:  # it may start a program
            used, looked = max(used, (used_memory() or 0) - before), time.monotonic()

    text = ""
    try:
        text = _answer_of(command, look)
    except EngineError:
        if not fails:
            raise
    return (resident, used), text


def _peak_of(process: int) -> int:
    """Returns the peak resident bytes of a process so far; 0 where it is gone, or the system does not tell."""
    try:
        for line in Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    except (OSError, ValueError):
        pass
    return 0
