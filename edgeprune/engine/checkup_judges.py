"""The judgement of what the tasks of ondevice/checkup.py returned: words where it is right, an error where it is not.

Pure: each function takes an answer and returns what it found, or raises EngineError with what to do, or NotApplicable.
"""

from __future__ import annotations

import re
from typing import Any

from edgeprune.engine.checks import NotApplicable
from edgeprune.errors import EngineError, WrongEngine
from edgeprune.ondevice.budget import format_bytes, format_ms
from edgeprune.ondevice.checkup import MANY, STEPS

SEEN = 0.9  # of the bytes that were allocated; a reading of the device's memory that shows less misses some
MOST_RUNTIME = 4  # times the profile's figure for the runtime, beyond which something else took memory
MOST_PROCESS = 2**30  # bytes of a process beyond the parts of a small model, at most
LATE_MS = 2.0  # by which the steps' times may exceed the host's clock, in all
POWER = ("power mode", "gpu clock range", "clocks sm", "clocks max sm", "power limit", "persistence mode")
HOT = 90.0  # degrees Celsius: boards slow their clocks down from there on


def judge_cache(answer: dict[str, Any]) -> str:
    """Judges whether every buffer of the KV cache was updated in place, and nowhere but at the new token's."""
    buffers, written, kept = answer["buffers"], answer["written"], answer["kept"]
    if not written == kept == buffers:
        raise WrongEngine(
            f"of {buffers} buffers that are past and present at once, a step wrote its token to {written} and left "
            f"{kept} as they were before it",
            "Do not deploy there. Update the engine, and run its tests.",
        )
    return f"each of {buffers} buffers is past and present at once, and a step wrote its own place alone"


def judge_clock(answer: dict[str, Any]) -> str:
    """Judges whether the times of steps are positive, grow with the steps, and agree with the host's clock."""
    one, many, total, host = (answer[name] for name in ("one", "many", "sum", "host"))
    remedy = "Measure nothing there before this is right: check driver, clock and virtual machine."
    if answer["least"] <= 0:
        raise EngineError(f"a step took {answer['least']:.3g} ms, which no step takes", remedy)
    if total > host + LATE_MS:
        raise EngineError(
            f"{STEPS} steps took {format_ms(total)} by the device, and {format_ms(host)} by the host's clock", remedy
        )
    if many < MANY / 4 * one:
        raise EngineError(f"{MANY} steps took {format_ms(many)}, and one {format_ms(one)}", remedy)
    return f"a step {format_ms(one)}, {MANY} steps {format_ms(many)}, within the host's clock"


def judge_capture(answer: dict[str, Any], tolerance: float) -> str:
    """Judges whether a step can be replayed as a CUDA graph, with the same logits. tolerance: of the largest logit."""
    if not answer["captured"]:
        raise EngineError(
            f"{answer['layer']} or the engine refuses to capture a step",
            "Everything works without, but a small model's decode waits for the processor. Update TensorRT and the "
            "driver.",
        )
    if answer["error"] > tolerance:
        raise WrongEngine(
            f"the replay's logits differ from the step's by {answer['error']:.2g} of the largest",
            "Do not trust latencies that are measured as replays there. Update the driver and TensorRT.",
        )
    return f"a captured step was replayed, its logits differ by {answer['error']:.2g} of the largest"


def judge_gpu_memory(answer: dict[str, Any], weights: int, runtime: float) -> str:
    """Judges whether the device lost what the parts of an engine sum up to, and the runtime's part besides.

    weights: the builder's bytes; runtime: the profile's bytes for the runtime. Raises EngineError also where the
    device does not tell its memory.
    """
    if answer["before"] is None or answer["after"] is None:
        raise EngineError(
            "the device does not tell the memory in use", "Check that nvidia-smi works there, or /proc/meminfo."
        )
    lost = answer["after"] - answer["before"]
    known = weights + sum(answer[name] for name in ("activations", "cache", "buffers", "ballast"))
    words = f"the device lost {format_bytes(lost)}, the parts sum up to {format_bytes(known)}"
    if lost < SEEN * known:
        raise EngineError(
            words,
            "Figures of memory from there are too low. Close what else runs there and check again; if it persists, "
            "its reading of the memory is wrong: please report it.",
        )
    if lost - known > MOST_RUNTIME * runtime:
        raise EngineError(
            f"{words}, which leaves {format_bytes(lost - known)} for the runtime; the profile says "
            f"{format_bytes(runtime)}",
            "Close what else runs there and check again; if it persists, correct runtime_memory in a profile of your "
            "own.",
        )
    return f"{words}; the rest is the runtime's" if lost > known else words


def judge_process_memory(answer: dict[str, Any], known: int) -> str:
    """Judges whether a process grew by what the parts of a graph sum up to (known: bytes)."""
    grown = answer["peak"] - answer["baseline"]
    words = f"the process grew by {format_bytes(grown)}, weights, cache and buffers sum up to {format_bytes(known)}"
    if not SEEN * known <= grown <= known + MOST_PROCESS:
        raise EngineError(
            words, "Figures of memory from there cannot be trusted: check how /proc/self/status counts there."
        )
    return words


def judge_power(conditions: dict[str, str]) -> str:
    """Returns power mode and clocks in words. Raises NotApplicable where none is told."""
    told = {name: value for name in POWER if (value := conditions.get(name))}
    if not told:
        raise NotApplicable("neither nvpmodel, nvidia-smi nor a GPU's clock is there to be read")
    return "; ".join(f"{name} {value}" for name, value in told.items())


def judge_heat(conditions: dict[str, str]) -> str:
    """Returns the temperatures in words. Raises EngineError where one is too high, NotApplicable where none is told."""
    words = "; ".join(conditions[name] for name in ("temperatures", "temperature gpu") if name in conditions)
    degrees = [float(number) for number in re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?(?![\w.])", words)]
    if not degrees:
        raise NotApplicable("the machine tells no temperature")
    highest = f"{max(degrees):.0f} degrees Celsius"
    if max(degrees) >= HOT:
        raise EngineError(f"{highest} ({words})", "Let it cool down, or cool it better: it slows down.")
    return f"{highest} at most ({words})"
