"""The requests to build, check and measure engines, on this machine or a device, and the figures of their answers.

This file also runs on the device: Python 3.10, standard library only. It handles files and bytes; it knows no model.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from edgeprune.errors import BadAnswer
from edgeprune.files import printable
from edgeprune.ondevice.durations import timing
from edgeprune.ondevice.figures import Built, Figure, Measured, Memory, Performance, Workload
from edgeprune.ondevice.reference import codes_of, judge_logits
from edgeprune.ondevice.tensorrt import BuildResult
from edgeprune.ondevice.worker import OnProgress, ask

TASKS = "edgeprune.ondevice.tasks"
_MOST = 1e18  # bytes, ms, or a ratio
_MEASURE_AGAIN = "Measure again on an idle device; if it persists, check its clock and its driver."
BUILD_SECONDS, MEASURE_SECONDS, CHECK_SECONDS, DESCRIBE_SECONDS = 3600.0, 1800.0, 600.0, 120.0


class Session(Protocol):
    """A place where tasks run: this machine, or a device over ssh. The paths in requests are of this machine."""

    def run(self, request: dict[str, Any], timeout_seconds: float, on_progress: OnProgress) -> dict[str, Any]:
        """Runs a task and returns its answer, once the outputs that the request names exist. Raises EngineError."""


class LocalSession:
    """A session on this machine, which runs each task in a process of its own."""

    def run(self, request: dict[str, Any], timeout_seconds: float, on_progress: OnProgress) -> dict[str, Any]:
        """Runs a task in a process of its own and returns its answer. Raises EngineError."""
        return ask(TASKS, request, timeout_seconds, on_progress)


@dataclass(frozen=True)
class Counted:
    """The bytes that are known from a graph or a file alone."""

    weights: int
    cache: int
    buffers: int


def describe(session: Session, on_progress: OnProgress) -> dict[str, Any]:
    """Returns the machine, modules and GPU of the device, as `machine.describe` does. Raises EngineError."""
    return session.run({"task": "the inspection of the device", "do": "describe"}, DESCRIBE_SECONDS, on_progress)


def in_process(
    session: Session,
    engine: str,
    dense: Path | None,
    candidate: Path,
    workload: Workload,
    counted: Counted,
    on_progress: OnProgress,
    reference: Path | None = None,
    precision: str = "fp32",
    seconds: float | None = None,
) -> Performance:
    """Measures memory and latency of a candidate in an engine that reads a model's file in a process of its own.

    With `dense` both are timed in turn, and ratios to it are returned. dense, candidate: of ONNX Runtime graphs of its
    dialect with `last` logits, of llama.cpp GGUF files. Weights, cache and buffers are exact bytes. The peak of the
    whole process beyond them and beyond the runtime counts as activations, so it includes the weights that an engine
    holds again in a packed layout. With a reference the logits are checked first. Raises EngineError.
    """
    # Check the logits before anything is timed.
    checked = {}
    if reference is not None:
        files = {"graph": str(candidate), "reference": str(reference)}
        checked = check_logits(session, engine, files, precision, candidate.name, on_progress)
    # Time the candidate, in turn with the dense model where there is one.
    graphs = {"candidate": candidate} if dense is None else {"dense": dense, "candidate": candidate}
    latency = _latency(session, engine, graphs, workload, seconds, on_progress)
    figures = {kind: latency[kind]["candidate"] for kind in ("prefill", "decode")}
    device = latency["device"]
    ratios = {}
    if dense is not None:
        ratios = {f"{kind}_ratio": _measured(figure["ratio"], "1", device) for kind, figure in figures.items()}
    # Measure the memory of the candidate alone, in a fresh process.
    return Performance(
        memory=_process_memory(session, engine, candidate, workload, counted, device, on_progress),
        prefill=_measured(figures["prefill"]["median"], "ms", device),
        decode=_measured(figures["decode"]["median"], "ms", device),
        percentiles={kind: figure["percentiles"] for kind, figure in figures.items()},
        conditions={**checked, **latency["conditions"]},
        **ratios,
    )


def ratios_on_onnxruntime(
    session: Session, dense: Path, candidate: Path, workload: Workload, seconds: float, on_progress: OnProgress
) -> dict[str, Measured]:
    """Returns `prefill_ratio` and `decode_ratio` of a candidate to the dense model, timed in turn in ONNX Runtime.

    Raises EngineError.
    """
    graphs = {"dense": dense, "candidate": candidate}
    latency = _latency(session, "onnxruntime", graphs, workload, seconds, on_progress)
    return {
        f"{kind}_ratio": _measured(latency[kind]["candidate"]["ratio"], "1", latency["device"])
        for kind in ("prefill", "decode")
    }


def relative_latencies(
    session: Session, engine: str, files: dict[str, Path], workload: Workload, seconds: float, on_progress: OnProgress
) -> dict[str, dict[str, float]]:
    """Returns the median latencies of models relative to the first one's, {"decode": {NAME: RATIO}, ...}.

    Their files are as of in_process, and are timed in turn. Raises EngineError.
    """
    latency = _latency(session, engine, files, workload, seconds, on_progress)
    first = next(iter(files))
    return {
        kind: {name: 1.0 if name == first else _ratio(latency[kind][name], latency["device"]) for name in files}
        for kind in ("prefill", "decode")
    }


def _ratio(timed: dict[str, Any], device: str) -> float:
    return _measured(timed["ratio"], "1", device).value


def engine_latencies(
    session: Session, flavour: str, plan: Path, workload: Workload, seconds: float, on_progress: OnProgress
) -> dict[str, float]:
    """Returns the median `prefill` and `decode` in ms of an engine on the GPU; does not check its logits.

    Raises EngineError.
    """
    latency = _timed(session, flavour, plan, workload, seconds, on_progress)
    device = latency["device"]
    return {kind: _measured(latency[kind]["candidate"]["median"], "ms", device).value for kind in ("prefill", "decode")}


def build(
    session: Session,
    flavour: str,
    graph: Path,
    plan: Path,
    workload: Workload,
    on_progress: OnProgress,
    sm: int | None = None,
    workspace_bytes: int | None = None,
) -> BuildResult:
    """Builds an engine from a graph into `plan` and returns the builder's figures.

    sm: the compute capability of a GPU that need not be there (TensorRT for RTX only), None for the GPU of the
    session. Raises EngineError.
    """
    # One request for all builders; its outputs exist when the session answers.
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
    result = session.run(request, BUILD_SECONDS, on_progress)
    for name in ("weights_bytes", "activation_bytes", "scratch_bytes", "peak_build_bytes"):
        _figure(result[name], "bytes", least=0)
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
    on_progress: OnProgress,
    seconds: float | None = None,
) -> Performance:
    """Checks and measures an engine on the GPU that it was built for.

    The weights are the builder's figure, activations and scratch what the engine asks for. The KV cache, of which an
    engine that is not in place has two, and the buffers are what was allocated. The runtime's part is the other memory
    that the device lost meanwhile, or `runtime` where the device does not report it. Raises EngineError where the
    engine's logits are not the graph's, before anything is timed.
    """
    # Check the logits before anything is timed.
    files = {"plan": str(plan), "reference": str(reference)}
    checked = check_logits(session, flavour, files, precision, plan.name, on_progress)
    # Time the engine, and split the memory that it took by its source.
    measurement = _timed(session, flavour, plan, workload, seconds or timing().measure_seconds, on_progress)
    device, memory = measurement["device"], measurement["memory"]
    basis = f"{flavour} {built.version}, {built.effort}"
    weights = Built(float(built.weights_bytes), "bytes", device, f"the builder's total weights memory; {basis}")
    activations = Built(
        _figure(memory["activations"], "bytes", least=0), "bytes", device, f"what the engine asks for; {basis}"
    )
    known = weights.value + activations.value + memory["cache"] + memory["buffers"]
    if memory["used"] is not None and memory["used"] > known:  # where it is less, another program gave memory back
        runtime = _exact(memory["used"] - known, device)
    return Performance(
        memory=Memory(
            weights, _exact(memory["cache"], device), activations, _exact(memory["buffers"], device), runtime
        ),
        prefill=_measured(measurement["prefill"]["candidate"]["median"], "ms", device),
        decode=_measured(measurement["decode"]["candidate"]["median"], "ms", device),
        percentiles={kind: measurement[kind]["candidate"]["percentiles"] for kind in ("prefill", "decode")},
        notes=(*built.warnings, *measurement["notes"]),
        conditions={
            **checked,
            "engine": basis,
            **measurement["conditions"],
            "cuda": f"{measurement['gpu']['layer']}, driver {measurement['gpu']['driver']}",
        },
    )


def _timed(
    session: Session, flavour: str, plan: Path, workload: Workload, seconds: float, on_progress: OnProgress
) -> dict[str, Any]:
    """Returns latency and memory of an engine on the GPU as the task answers them."""
    request = {
        "task": f"the measurement of {plan.name}",
        "do": "measure",
        "engine": flavour,
        "workload": asdict(workload),
        "files": {"plan": str(plan)},
        "seconds": seconds,
    }
    return session.run(request, MEASURE_SECONDS, on_progress)


def check_logits(
    session: Session, engine: str, files: dict[str, str], precision: str, name: str, on_progress: OnProgress
) -> dict[str, str]:
    """Returns the agreement of an engine's logits with its reference in words. Raises WrongEngine."""
    request = {"task": f"the check of {name}", "do": "check", "engine": engine, "files": files}
    against = "logits against the fp32 graph" + (" of the bf16 weights" if precision == "bf16" else "")
    agreement = session.run(request, CHECK_SECONDS, on_progress)
    return {against: judge_logits(agreement, precision, name, codes_of(Path(files["reference"])))}


def _latency(
    session: Session,
    engine: str,
    files: dict[str, Path],
    workload: Workload,
    seconds: float | None,
    on_progress: OnProgress,
) -> dict[str, Any]:
    """Returns latencies of files timed in turn, as the task answers them; seconds 0 or None: the default."""
    request = {
        "task": "the measurement",
        "do": "measure",
        "engine": engine,
        "workload": asdict(workload),
        "files": {name: str(path) for name, path in files.items()},
        "seconds": seconds or timing().measure_seconds,
    }
    return session.run(request, MEASURE_SECONDS, on_progress)


def process_memory(
    session: Session, engine: str, path: Path, workload: Workload, on_progress: OnProgress
) -> dict[str, int]:
    """Returns the bytes of a fresh process with a file as the task answers them: `baseline` and `peak`."""
    request = {
        "task": "the measurement of memory",
        "do": "memory",
        "engine": engine,
        "workload": asdict(workload),
        "files": {"candidate": str(path)},
    }
    return session.run(request, MEASURE_SECONDS, on_progress)


def _process_memory(
    session: Session,
    engine: str,
    path: Path,
    workload: Workload,
    counted: Counted,
    device: str,
    on_progress: OnProgress,
) -> Memory:
    """Measures a fresh process with the file; its bytes beyond the known ones and the runtime are activations."""
    process = process_memory(session, engine, path, workload, on_progress)
    known = counted.weights + counted.cache + counted.buffers
    activations = max(0, process["peak"] - process["baseline"] - known)

    sizes = (counted.weights, counted.cache, activations, counted.buffers, process["baseline"])
    return Memory(*(_exact(size, device) for size in sizes))


def _exact(value: float, device: str) -> Measured:
    bytes_ = _figure(value, "bytes", least=0)
    return Measured(bytes_, "bytes", device, bytes_, bytes_)


def _measured(interval: dict[str, float], unit: str, device: str) -> Measured:
    """Returns a time or a ratio with its interval. Raises BadAnswer for one that no clock gives."""
    value, low, high = (_figure(interval[name], unit) for name in ("value", "low", "high"))
    if not low <= value <= high:
        raise BadAnswer(f"the measurement gave {value:g} {unit} within {low:g} to {high:g}", _MEASURE_AGAIN)
    return Measured(value, unit, device, low, high)


def _figure(value: object, unit: str, least: float = 1e-9) -> float:
    """Returns a figure. Raises BadAnswer where it is none: not a number, below `least`, or without bounds."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and least <= value <= _MOST):  # NaN is not
        raise BadAnswer(f"the measurement gave {printable(repr(value), 40)} {unit}, which is no figure", _MEASURE_AGAIN)
    return float(value)


def scaled(ratio: Measured, dense: Measured) -> Measured:
    """Returns the dense model's figure times a ratio to it that was timed in turn: a busy machine's load cancels."""
    return replace(dense, value=ratio.value * dense.value, low=ratio.low * dense.value, high=ratio.high * dense.value)
