"""Measures graphs with ONNX Runtime on this machine, each measurement in a process of its own."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgeprune.engine.base import Measured, Memory, Performance, Workload
from edgeprune.engine.child import ask
from edgeprune.engine.probe import processor

MODULE = "edgeprune.engine.onnxruntime"
SECONDS = 40.0  # at most, for prefill and decode together
TIMEOUT_SECONDS = 1800.0


def latency(dense: Path, candidate: Path, workload: Workload, seconds: float = SECONDS) -> dict[str, Measured]:
    """`prefill_ratio` and `decode_ratio` of candidate to dense, interleaved. Raises EngineError."""
    answer = _latency({"dense": dense, "candidate": candidate}, workload, seconds)
    return {f"{kind}_ratio": _measured(answer[kind]["ratio"], "1") for kind in ("prefill", "decode")}


def measure(
    dense: Path | None, candidate: Path, workload: Workload, weight_bytes: int, cache_bytes: int, buffer_bytes: int
) -> Performance:
    """Memory and latency of a candidate; with `dense` interleaved with it and as ratios to it.

    dense, candidate: graphs of the onnxruntime dialect with `last` logits. Weights, cache and buffers
    are the graph's exact bytes; the peak of the whole process beyond them and beyond the runtime counts
    as activations, so the weights that ONNX Runtime holds again in a packed layout are among them.
    Raises EngineError.
    """
    graphs = {"candidate": candidate} if dense is None else {"dense": dense, "candidate": candidate}
    answer = _latency(graphs, workload, SECONDS)
    figures = {kind: answer[kind]["candidate"] for kind in ("prefill", "decode")}
    ratios = {} if dense is None else {f"{kind}_ratio": _measured(answer[kind]["ratio"], "1") for kind in figures}
    return Performance(
        memory=_memory(candidate, workload, weight_bytes, cache_bytes, buffer_bytes),
        prefill=_measured(figures["prefill"]["median"], "ms"),
        decode=_measured(figures["decode"]["median"], "ms"),
        percentiles={kind: figure["percentiles"] for kind, figure in figures.items()},
        **ratios,
    )


def _latency(graphs: dict[str, Path], workload: Workload, seconds: float) -> dict[str, Any]:
    request = {
        "task": "latency", "graphs": {name: str(path) for name, path in graphs.items()},
        "workload": asdict(workload), "threads": None, "seconds": seconds,
    }  # fmt: skip
    return ask(MODULE, request, TIMEOUT_SECONDS)


def _memory(graph: Path, workload: Workload, weights: int, cache: int, buffers: int) -> Memory:
    request = {"task": "memory", "graph": str(graph), "workload": asdict(workload), "threads": None}
    found = ask(MODULE, request, TIMEOUT_SECONDS)
    rest = max(0, found["peak"] - found["baseline"] - weights - cache - buffers)

    def part(value: float) -> Measured:
        return Measured(float(value), "bytes", processor(), float(value), float(value))

    return Memory(part(weights), part(cache), part(rest), part(buffers), part(found["baseline"]))


def _measured(interval: dict[str, float], unit: str) -> Measured:
    return Measured(interval["value"], unit, processor(), interval["low"], interval["high"])
