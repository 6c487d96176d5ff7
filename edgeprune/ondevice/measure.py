"""Has engines built, checked and measured, here or on a device behind a session, and makes figures of the answers.

This file also runs on the device: Python 3.10, standard library only. It sees files and bytes, no model.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from edgeprune.ondevice.durations import timing
from edgeprune.ondevice.figures import Built, Figure, Measured, Memory, Performance, Workload
from edgeprune.ondevice.reference import judge_logits
from edgeprune.ondevice.tensorrt import BuildResult
from edgeprune.ondevice.worker import Tell, ask

TASKS = "edgeprune.ondevice.tasks"
BUILD_SECONDS, MEASURE_SECONDS, CHECK_SECONDS, DESCRIBE_SECONDS = 3600.0, 1800.0, 600.0, 120.0


class Session(Protocol):
    """Where tasks run: this machine, or a device over ssh. Its files' paths are this machine's."""

    def run(self, request: dict[str, Any], timeout_seconds: float, tell: Tell) -> dict[str, Any]:
        """The task's answer; what the request names as outputs is there then. Raises EngineError."""


class Here:
    """This machine, each task in a process of its own."""

    def run(self, request: dict[str, Any], timeout_seconds: float, tell: Tell) -> dict[str, Any]:
        return ask(TASKS, request, timeout_seconds, tell)


@dataclass(frozen=True)
class Counted:
    """Bytes that are known from the graph alone."""

    weights: int
    cache: int
    buffers: int


def describe(session: Session, tell: Tell) -> dict[str, Any]:
    """The device's machine, modules and GPU: see `facts.describe`."""
    return session.run({"task": "the look at the device", "do": "describe"}, DESCRIBE_SECONDS, tell)


def on_onnxruntime(
    session: Session,
    dense: Path | None,
    candidate: Path,
    workload: Workload,
    counted: Counted,
    tell: Tell,
    reference: Path | None = None,
    precision: str = "fp32",
    seconds: float | None = None,
) -> Performance:
    """Memory and latency of a candidate; with `dense` interleaved with it and as ratios to it.

    dense, candidate: graphs of the onnxruntime dialect with `last` logits. Weights, cache and buffers
    are the graph's exact bytes; the peak of the whole process beyond them and beyond the runtime counts
    as activations, so the weights that ONNX Runtime holds again in a packed layout are among them.
    With a reference the graph's logits are checked first. Raises EngineError.
    """
    checked = {}
    if reference is not None:
        files = {"graph": str(candidate), "reference": str(reference)}
        checked = _check(session, "onnxruntime", files, precision, candidate.name, tell)
    graphs = {"candidate": candidate} if dense is None else {"dense": dense, "candidate": candidate}
    found = _latency(session, graphs, workload, seconds, tell)
    figures = {kind: found[kind]["candidate"] for kind in ("prefill", "decode")}
    device = found["device"]
    ratios = {}
    if dense is not None:
        ratios = {f"{kind}_ratio": _measured(figure["ratio"], "1", device) for kind, figure in figures.items()}
    return Performance(
        memory=_process_memory(session, candidate, workload, counted, device, tell),
        prefill=_measured(figures["prefill"]["median"], "ms", device),
        decode=_measured(figures["decode"]["median"], "ms", device),
        percentiles={kind: figure["percentiles"] for kind, figure in figures.items()},
        conditions={**checked, **found["conditions"]},
        **ratios,
    )


def ratios_on_onnxruntime(
    session: Session, dense: Path, candidate: Path, workload: Workload, seconds: float, tell: Tell
) -> dict[str, Measured]:
    """`prefill_ratio` and `decode_ratio` of candidate to dense, interleaved. Raises EngineError."""
    found = _latency(session, {"dense": dense, "candidate": candidate}, workload, seconds, tell)
    return {
        f"{kind}_ratio": _measured(found[kind]["candidate"]["ratio"], "1", found["device"])
        for kind in ("prefill", "decode")
    }


def relative_latencies(
    session: Session, graphs: dict[str, Path], workload: Workload, seconds: float, tell: Tell
) -> dict[str, dict[str, float]]:
    """Medians of several graphs over that of the first, by kind and name, interleaved in ONNX Runtime.

    Raises EngineError.
    """
    found = _latency(session, graphs, workload, seconds, tell)
    first = next(iter(graphs))
    return {
        kind: {name: 1.0 if name == first else found[kind][name]["ratio"]["value"] for name in graphs}
        for kind in ("prefill", "decode")
    }


def engine_latencies(
    session: Session, flavour: str, plan: Path, workload: Workload, seconds: float, tell: Tell
) -> dict[str, float]:
    """Medians of an engine on the GPU in ms, by kind; its logits are not looked at. Raises EngineError."""
    found = _timed(session, flavour, plan, workload, seconds, tell)
    return {kind: found[kind]["candidate"]["median"]["value"] for kind in ("prefill", "decode")}


def build(
    session: Session,
    flavour: str,
    graph: Path,
    plan: Path,
    workload: Workload,
    tell: Tell,
    sm: int | None = None,
    workspace_bytes: int | None = None,
) -> BuildResult:
    """An engine from a graph. sm: for a GPU that is not there (TensorRT for RTX). Raises EngineError."""
    request = {
        "task": f"the build of {graph.name}",
        "do": "build",
        "engine": flavour,
        "workload": asdict(workload),
        "files": {"graph": str(graph)},
        "outputs": {"plan": str(plan)},
        "sm": sm,
        "workspace_bytes": workspace_bytes,
    }
    result = session.run(request, BUILD_SECONDS, tell)
    return BuildResult(**{**result, "warnings": tuple(result["warnings"])})


def on_tensorrt(
    session: Session,
    flavour: str,
    plan: Path,
    built: BuildResult,
    workload: Workload,
    runtime: Figure,
    reference: Path,
    precision: str,
    tell: Tell,
    seconds: float | None = None,
) -> Performance:
    """Check and measure an engine on the GPU that it was built for.

    Weights are the builder's figure, activations and scratch what the engine asks for; the cache, both
    halves, and the buffers are what was allocated; the runtime's part is what else the device lost meanwhile,
    or as given where it does not say. Raises EngineError where the engine's logits are not
    the graph's, before anything is timed.
    """
    files = {"plan": str(plan), "reference": str(reference)}
    checked = _check(session, flavour, files, precision, plan.name, tell)
    found = _timed(session, flavour, plan, workload, seconds or timing().measure_seconds, tell)
    device, memory = found["device"], found["memory"]
    basis = f"{flavour} {built.version}, {built.effort}"
    weights = Built(float(built.weights_bytes), "bytes", device, f"the builder's total weights memory; {basis}")
    activations = Built(float(memory["activations"]), "bytes", device, f"what the engine asks for; {basis}")
    known = weights.value + activations.value + memory["cache"] + memory["buffers"]
    if memory["used"] is not None and memory["used"] > known:  # less: another program gave memory back meanwhile
        runtime = _exact(memory["used"] - known, device)
    return Performance(
        memory=Memory(
            weights, _exact(memory["cache"], device), activations, _exact(memory["buffers"], device), runtime
        ),
        prefill=_measured(found["prefill"]["candidate"]["median"], "ms", device),
        decode=_measured(found["decode"]["candidate"]["median"], "ms", device),
        percentiles={kind: found[kind]["candidate"]["percentiles"] for kind in ("prefill", "decode")},
        notes=(*built.warnings, *found["notes"]),
        conditions={
            **checked,
            "engine": basis,
            **found["conditions"],
            "cuda": f"{found['gpu']['layer']}, driver {found['gpu']['driver']}",
        },
    )


def _timed(
    session: Session, flavour: str, plan: Path, workload: Workload, seconds: float, tell: Tell
) -> dict[str, Any]:
    request = {
        "task": f"the measurement of {plan.name}",
        "do": "measure",
        "engine": flavour,
        "workload": asdict(workload),
        "files": {"plan": str(plan)},
        "seconds": seconds,
    }
    return session.run(request, MEASURE_SECONDS, tell)


def _check(
    session: Session, engine: str, files: dict[str, str], precision: str, what: str, tell: Tell
) -> dict[str, str]:
    request = {"task": f"the check of {what}", "do": "check", "engine": engine, "files": files}
    against = "logits against the fp32 graph" + (" of the bf16 weights" if precision == "bf16" else "")
    return {against: judge_logits(session.run(request, CHECK_SECONDS, tell), precision, what)}


def _latency(
    session: Session, graphs: dict[str, Path], workload: Workload, seconds: float, tell: Tell
) -> dict[str, Any]:
    request = {
        "task": "the measurement",
        "do": "measure",
        "engine": "onnxruntime",
        "workload": asdict(workload),
        "files": {name: str(path) for name, path in graphs.items()},
        "seconds": seconds or timing().measure_seconds,
    }
    return session.run(request, MEASURE_SECONDS, tell)


def _process_memory(
    session: Session, graph: Path, workload: Workload, counted: Counted, device: str, tell: Tell
) -> Memory:
    request = {
        "task": "the measurement of memory",
        "do": "memory",
        "engine": "onnxruntime",
        "workload": asdict(workload),
        "files": {"candidate": str(graph)},
    }
    found = session.run(request, MEASURE_SECONDS, tell)
    known = counted.weights + counted.cache + counted.buffers
    rest = max(0, found["peak"] - found["baseline"] - known)

    parts = (counted.weights, counted.cache, rest, counted.buffers, found["baseline"])
    return Memory(*(_exact(value, device) for value in parts))


def _exact(value: float, device: str) -> Measured:
    return Measured(float(value), "bytes", device, float(value), float(value))


def _measured(interval: dict[str, float], unit: str, device: str) -> Measured:
    return Measured(interval["value"], unit, device, interval["low"], interval["high"])


def scaled(ratio: Measured, dense: Measured) -> Measured:
    """The dense model's figure times a ratio that was interleaved with it: a busy machine cancels."""
    return replace(dense, value=ratio.value * dense.value, low=ratio.low * dense.value, high=ratio.high * dense.value)
