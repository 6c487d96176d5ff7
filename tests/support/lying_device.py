"""A device that lies: true answers of every task, and what a stranger may make of them."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgeprune.ondevice import measure
from edgeprune.report.schema import Report
from tests.support.bundles import contents
from tests.support.durations import durations

ABSENT = ("tensorrt_rtx", "onnxruntime", "xllamacpp")  # of the modules
TIMED = {
    "percentiles": {"p50": 2.0, "p90": 2.2, "p99": 2.4, "mad": 0.1},
    "median": {"value": 2.0, "low": 1.9, "high": 2.1},
}
IN_TURN = {**TIMED, "ratio": {"value": 0.8, "low": 0.79, "high": 0.81}}
GPU = {"name": "Orin", "sm": 87, "memory": 8 << 30, "driver": 12060, "layer": "cuda-python 12.6"}
CONDITIONS = {"power mode": "15W", "clocks": "locked"}
TRUE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "describe": (
        {"do": "describe"},
        {
            "machine": "a board",
            "processor": "Cortex, 8 threads",
            "python": "3.10.12",
            "modules": {"numpy": "1.26", "tensorrt": "10.3", **dict.fromkeys(ABSENT)},
            "missing": dict.fromkeys(ABSENT, "ModuleNotFoundError: x"),
            "gpu": GPU,
            "no_gpu": "",
            "memory": {"total": 8 << 30, "available": 6 << 30, "swapped": 0},
            "platform": "linux",
        },
    ),
    "build": (
        {"do": "build", "engine": "tensorrt"},
        {
            "version": "10.3",
            "weights_bytes": 1000,
            "activation_bytes": 100,
            "scratch_bytes": 0,
            "seconds": 12.5,
            "peak_build_bytes": 4000,
            "warnings": ["a warning"],
        },
    ),
    "check": ({"do": "check", "engine": "tensorrt"}, {"cosine": 0.99999, "error": 0.001, "equal": 1.0, "positions": 8}),
    "measure": (
        {"do": "measure", "engine": "onnxruntime", "files": {"dense": "a", "candidate": "b"}},
        {
            "prefill": {"dense": TIMED, "candidate": IN_TURN},
            "decode": {"dense": TIMED, "candidate": IN_TURN},
            "device": "Cortex, 8 threads",
            "conditions": CONDITIONS,
        },
    ),
    "measure on a GPU": (
        {"do": "measure", "engine": "tensorrt", "files": {"plan": "a"}},
        {
            "prefill": {"candidate": TIMED},
            "decode": {"candidate": TIMED},
            "memory": {"activations": 100, "cache": 200, "buffers": 10, "used": 5000},
            "gpu": GPU,
            "device": "Orin",
            "notes": [],
            "conditions": CONDITIONS,
        },
    ),
    "memory": ({"do": "memory", "engine": "onnxruntime"}, {"baseline": 1000, "peak": 5000}),
    "inspect": (
        {"do": "probe", "step": "inspect"},
        {"version": "1.32", "runtime": 10, "processor": "x", "memory": 8e9, "cache": 1 << 20, "available": None},
    ),
    "time": (
        {"do": "probe", "step": "time", "engine": "onnxruntime", "files": {"call": "a", "read": "b"}},
        {
            "took": {"call": {"seconds": 1e-5, "spread": 0.1}, "read": {"seconds": 0.01, "spread": 0.0}},
            "load": 0.3,
            "conditions": CONDITIONS,
        },
    ),
    "state": (
        {"do": "checkup", "step": "state"},
        {"folder": "/cache", "free": 1 << 30, "gpu_free": None, "conditions": CONDITIONS},
    ),
    "cache": ({"do": "checkup", "step": "cache"}, {"buffers": 4, "written": 4, "kept": 4}),
    "clock": ({"do": "checkup", "step": "clock"}, {"one": 2.0, "least": 1.9, "sum": 40.0, "many": 16.0, "host": 41.0}),
    "capture": ({"do": "checkup", "step": "capture"}, {"captured": True, "layer": "cuda-python 12.6", "error": 0.0}),
    "memory in use": (
        {"do": "checkup", "step": "memory"},
        {"before": 1000, "after": 5000, "activations": 100, "cache": 200, "buffers": 10, "ballast": 2000},
    ),
}
"""A request, as far as its answer depends on it, and its true answer, by name."""
ESCAPES = "\x1b[2J\x1b]0;gone\x07\u202e"
LIES: tuple[Any, ...] = (
    None,
    True,
    [],
    {},
    "2.0",
    ESCAPES,
    -5,
    -5.0,
    float("nan"),
    float("inf"),
    float("-inf"),
    1 << 62,
    -(1 << 62),
    1e300,
    10**400,
    "x" * 200_000,
    [0] * 20_000,
)


def places(answer: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of all values of an answer, the whole of it first."""
    yield place
    parts = answer.items() if isinstance(answer, dict) else enumerate(answer) if isinstance(answer, list) else ()
    for key, value in parts:
        yield from places(value, (*place, key))


def lie(answer: dict[str, Any], seed: int) -> tuple[str, Any]:
    """The name of a change and the changed answer: one value is another, is gone, or has a neighbour."""
    drawn = random.Random(seed)
    changed = {"answer": json.loads(json.dumps(answer))}
    *path, last = ("answer", *drawn.choice(list(places(answer))))
    holder: Any = changed
    for key in path:
        holder = holder[key]
    name = ".".join(map(str, (*path, last)))
    how = drawn.choice(["lie", "lie", "lie", "gone", "more"])
    if how == "gone" and path:
        del holder[last]
    elif how == "more" and isinstance(holder[last], dict):
        holder[last] = {**holder[last], ESCAPES: drawn.choice(LIES)}
    else:
        how, holder[last] = "lie", drawn.choice(LIES)
    return f"{how} {name}", changed["answer"]


def line_of(document: Any) -> bytes:
    """The line that carries a document, NaN and all."""
    return json.dumps(document).encode() + b"\n"


JETSON = {name.split()[0]: TRUE[name][1] for name in ("describe", "build", "check", "measure on a GPU")}
"""The true answers of a device on which a bundle for SM 87 is measured, by task."""
MESSAGES = ("hello", "missing", "go", "done", "progress", *(f"answer to {task}" for task in JETSON), "size", "left")
LINES = (
    *("", "\n", "{}\n", "[]\n", "null\n", "what?\n", '{"answer": ', "\udcff\udcfe\n", "\x1b[2Jgone\x07\n", "\0\n"),
    *("[" * 100_000 + "\n", '{"size": ' + "9" * 5000 + "}\n", "x" * 2_000_000, "x" * 2_000_000 + "\n"),
    *(json.dumps(document) + "\n" for document in ({"error": 5}, {"error": ESCAPES, "remedy": ESCAPES}, {"left": 5})),
    *(f'{{"size": {size}}}\n' for size in ("-1", "0", "3", "1e400", "NaN", str(1 << 62), str(1 << 49))),
    *('{"missing": ["../x"]}\n', '{"go": false}\n', '{"done": 1}\n', '{"progress": ["x", NaN, -1]}\n'),
    *('{"protocol": 1}\n', '{"protocol": 7, "python": "3", "work": "/x"}\n', '{"alive": 0, "answer": {}}\n'),
)
AFTERWARDS = (None, None, "silence", "stop", "close", "x", "y\n", '{"alive": true}\n', '{"progress": ["x", 1, 2]}\n')
_SHORT = {
    "silence_seconds": 1.0,
    "greeting_seconds": 2.0,
    "answer_seconds": 2.0,
    "grace_seconds": 0.0,
    "leave_seconds": 0.2,
}


def shorten(patch: pytest.MonkeyPatch) -> None:
    """Makes every wait so short that a lie costs a second or two: too short for a device of flesh and blood."""
    for name, value in durations(**_SHORT).items():
        patch.setenv(name, value)
    for name in ("BUILD_SECONDS", "MEASURE_SECONDS", "CHECK_SECONDS", "DESCRIBE_SECONDS"):
        patch.setattr(measure, name, 2.0)


def lying_plan(seed: int) -> tuple[str, dict[str, Any]]:
    """The name and the plan of a device that lies once: in a figure of an answer, or in how it talks."""
    drawn = random.Random(seed)
    answers: dict[str, Any] = dict(JETSON)
    if drawn.random() < 0.6:
        task = drawn.choice(list(JETSON))
        name, answers[task] = lie(JETSON[task], seed)
        return f"{task}: {name}", {"answers": answers, "lies": {}}
    message, line, then = drawn.choice(MESSAGES), drawn.choice(LINES), drawn.choice(AFTERWARDS)
    return f"{message}: {line[:30]!r} then {then!r}", {
        "answers": answers,
        "lies": {message: {"line": line, "then": then}},
    }


class LyingBoard:
    """A device whose ssh is a program of ours that follows a plan. path: PATH with it first."""

    target = "ssh://me@board"

    def __init__(self, folder: Path) -> None:
        self._plan = folder / "plan.json"
        (folder / "bin").mkdir(parents=True)
        words = [sys.executable, "-S", "-E", str(Path(__file__).parent / "doubles" / "liar.py"), str(self._plan)]
        script = folder / "bin" / "ssh"
        script.write_text(f"#!/bin/sh\nexec {shlex.join(words)}\n")
        script.chmod(0o755)
        self.path = f"{folder}/bin:{os.environ['PATH']}"

    def follow(self, plan: dict[str, Any]) -> None:
        """From now on the device answers by this plan."""
        self._plan.write_text(json.dumps(plan))


def faults(bundle: Path, before: dict[str, str], result: subprocess.CompletedProcess) -> list[str]:
    """What is wrong about `edgeprune measure` of a bundle on a device that may have lied; before: its contents."""
    output, wrong = result.stdout + result.stderr, []
    if result.returncode not in (0, 3, 4):
        wrong.append(f"exit code {result.returncode}")
    if "Traceback" in output:
        wrong.append(f"a traceback: {output.strip().splitlines()[-1]}")
    if not output.replace("\n", "").isprintable():
        wrong.append("control characters on the terminal")
    if len(output) > 20_000:
        wrong.append(f"{len(output)} characters on the terminal")
    if result.returncode == 4 and contents(bundle) != before:
        wrong.append("it failed and changed the bundle")
    if result.returncode in (0, 3):
        try:
            for name in ("report.json", "measurement.json"):
                json.loads((bundle / name).read_text(), parse_constant=_refuse)
            report = Report.model_validate_json((bundle / "report.json").read_text())
        except ValueError as error:
            return [*wrong, f"the report cannot be read: {error}"]
        latencies = [getattr(report.fitted.performance, name) for name in ("prefill", "decode")]
        if not all(0 < figure.low <= figure.value <= figure.high < float("inf") for figure in latencies):
            wrong.append(f"latencies that cannot be: {latencies}")
        if re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", report.measurement.model_dump_json()):
            wrong.append("control characters in the report")
    return wrong


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
