"""A device that lies: true answers of every task, and what a stranger may make of them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

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
            "modules": {"numpy": "1.26", "tensorrt": "10.3", "tensorrt_rtx": None, "onnxruntime": None},
            "missing": {"tensorrt_rtx": "ModuleNotFoundError: x", "onnxruntime": "ModuleNotFoundError: x"},
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
    "x" * 2_000_000,
    [0] * 1_000_000,
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
