"""Builds engines with TensorRT or TensorRT for RTX, through one adapter, in a process of its own.

This file also runs on the device: Python 3.10, standard library and one of the two modules. Without a
GPU nothing is deserialised or run: memory is read from the builder's messages.
"""

from __future__ import annotations

import importlib
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune.errors import EngineError
from edgeprune.ondevice.figures import Workload
from edgeprune.ondevice.machine import peak_bytes
from edgeprune.ondevice.runtimes import RUNTIMES
from edgeprune.ondevice.worker import Tell, quiet

WEIGHTS_TOLERANCE = 1.05  # more than that over the graph's bytes, and something is stored twice
_REMEDIES = {  # what TensorRT for RTX 1.7 lacks (measured): an Attention kernel in fp32, and all of fp32 on SM 75
    "Attention operation was not supported": "Set `dialect` in the device's profile to primitive, or use "
    "--precision fp16.",
    "FP32 GEMM is not supported": "Use --precision fp16: TensorRT for RTX has no fp32 on this GPU.",
    "HW-specific datatypes: b16": "Use --precision fp16: GPUs before SM 80 have no bf16.",
}
_SMALLER = "Try a smaller --context or --batch, or another release of TensorRT."
_NO_DRIVER = re.compile(r"cudaError (35|100)\b")  # said beside any other error on a machine without a GPU
_FIGURE = re.compile(r"(Total Weights Memory|Total Activation Memory|Max Scratch Memory):\s*(\d+)")


@dataclass(frozen=True)
class BuildResult:
    """What the builder said of an engine: bytes, seconds, its version; warnings in words.

    A context needs activation_bytes + scratch_bytes: the builder's total activation memory contains the
    scratch memory (it is one of the blocks that are assigned to it), here the two are apart.
    """

    version: str
    weights_bytes: int
    activation_bytes: int
    scratch_bytes: int
    seconds: float
    peak_build_bytes: int
    warnings: tuple[str, ...]

    @property
    def effort(self) -> str:
        return f"built in {self.seconds:.0f} s with {self.peak_build_bytes / 2**20:.0f} MiB of memory at its peak"


def import_tensorrt(flavour: str) -> Any:
    """The module of a flavour. Raises EngineError with the command that installs it."""
    try:
        return importlib.import_module(RUNTIMES[flavour].module)
    except Exception as error:  # a missing library is no ImportError in every release
        raise EngineError(
            f"{flavour} cannot be imported: {error}", f"Install it with: {RUNTIMES[flavour].install_here}"
        ) from None


def available(flavour: str) -> tuple[bool, str]:
    """Whether engines of this flavour can be built here, and its version or the reason."""
    try:
        trt = import_tensorrt(flavour)
    except EngineError as error:
        return False, error.message
    return True, f"{RUNTIMES[flavour].module} {trt.__version__}"


def offered_sms() -> list[int]:
    """The compute capabilities that TensorRT for RTX builds for without the GPU. Raises EngineError."""
    trt = import_tensorrt("tensorrt-rtx")
    names = [name for name in dir(trt.ComputeCapability) if re.fullmatch(r"SM\d+", name)]
    return sorted(int(name[2:]) for name in names)


@dataclass(frozen=True)
class Limits:
    """workspace_bytes: scratch memory that a kernel may take at most; timing_cache: where timings are kept."""

    workspace_bytes: int | None = None
    timing_cache: Path | None = None


def compile_plan(
    graph: Path,
    plan: Path,
    workload: Workload,
    sm: int | None,
    flavour: str,
    limits: Limits = Limits(),
    tell: Tell = quiet,
) -> BuildResult:
    """Build in this process; where that stores weights twice, again with room for a batch of two.

    With a batch of exactly one TensorRT for RTX 1.7 keeps a transposed second copy of a tied embedding;
    with a maximum of two it does not (measured). The smaller of the two engines is kept.
    sm: compute capability to build for (TensorRT for RTX only), None: of the GPU here. Raises EngineError
    naming the node that the parser or the builder refuses.
    """
    parts = [plan.with_name(f"{plan.name}.{os.getpid()}.{index}.part") for index in range(2)]
    plan.parent.mkdir(parents=True, exist_ok=True)
    try:
        result = _compile(graph, parts[0], workload, workload.batch, sm, flavour, limits, tell)
        if result.weights_bytes and result.warnings and workload.batch == 1:
            wider = _compile(graph, parts[1], workload, 2, sm, flavour, limits, tell)
            if _held(wider) < _held(result):
                result, parts = wider, parts[::-1]
        parts[0].replace(plan)
    finally:
        for part in parts:
            part.unlink(missing_ok=True)
    return result


def _held(result: BuildResult) -> int:
    return result.weights_bytes + result.activation_bytes + result.scratch_bytes


def _compile(
    graph: Path, plan: Path, workload: Workload, most: int, sm: int | None, flavour: str, limits: Limits, tell: Tell
) -> BuildResult:
    """One build with one merged profile (two hold the weights twice), for batches from 1 to `most`."""
    trt = import_tensorrt(flavour)
    _check_sm(sm, flavour)
    start = time.monotonic()
    messages = Messages(trt)
    builder = trt.Builder(messages.logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, messages.logger)
    if not parser.parse_from_file(str(graph)):
        raise EngineError(_parser_errors(parser, graph), "Export again; a newer TensorRT may know the operator.")
    _let_attention_decompose(trt, network)
    config = builder.create_builder_config()
    if sm is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), 0)
    if limits.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, limits.workspace_bytes)
    timings = _open_timings(config, limits.timing_cache)
    config.progress_monitor = _monitor(trt, tell)
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        profile.set_shape(tensor.name, *shapes(tensor.name, tuple(tensor.shape), workload, most))
    config.add_optimization_profile(profile)
    if not _build(trt, builder, network, config, plan):
        layers = [network.get_layer(index).name for index in range(network.num_layers)]
        errors = messages.errors()
        raise EngineError(
            f"TensorRT cannot build {graph}{_blamed(errors, layers)}: {errors[-400:]}",
            next((remedy for text, remedy in _REMEDIES.items() if text in errors), _SMALLER),
        )
    if timings is not None:
        _write(limits.timing_cache, config.get_timing_cache().serialize())
    figures = messages.figures()
    weights, scratch = figures.get("Total Weights Memory", 0), figures.get("Max Scratch Memory", 0)
    return BuildResult(
        version=trt.__version__,
        weights_bytes=weights,
        activation_bytes=max(0, figures.get("Total Activation Memory", 0) - scratch),
        scratch_bytes=scratch,
        seconds=time.monotonic() - start,
        peak_build_bytes=peak_bytes(),
        warnings=_warnings(weights, graph),
    )


def _let_attention_decompose(trt: Any, network: Any) -> None:
    """Attention without a kernel of its own is refused else: in fp32, and of one token at a time where heads are 3 or
    fewer or no multiple of 8. Where there is a kernel, the engine is of the same size (TensorRT for RTX 1.7)."""
    if not hasattr(trt, "IAttentionOutputLayer"):
        return
    for index in range(network.num_layers):
        if network.get_layer(index).type == trt.LayerType.ATTENTION_OUTPUT:
            output = network.get_layer(index)
            output.__class__ = trt.IAttentionOutputLayer
            output.attention.decomposable = True


def _build(trt: Any, builder: Any, network: Any, config: Any, plan: Path) -> bool:
    """Build into a file; False where the builder refuses. Raises EngineError where the file cannot be written.

    Releases from 10.13 on write while they serialise, which saves a copy of the weights in memory: 5.6 GiB
    instead of 6.6 at the peak for 2.1 GiB of weights (measured).
    """
    if not hasattr(builder, "build_serialized_network_to_stream"):
        serialized = builder.build_serialized_network(network, config)
        if serialized is not None:
            plan.write_bytes(serialized)
        return serialized is not None
    problems: list[OSError] = []

    class Writer(trt.IStreamWriter):
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)

        def write(self, content: Any) -> int:
            try:
                return file.write(content)
            except OSError as error:  # it must not pass through the builder
                problems.append(error)
                return 0

    done = False
    try:
        with plan.open("wb") as file:
            done = builder.build_serialized_network_to_stream(network, config, Writer())
    except OSError as error:  # of the last bytes
        problems.append(error)
    if problems:
        raise EngineError(f"the engine cannot be written: {problems[0]}", "Free some space on the disk.")
    return done


def _check_sm(sm: int | None, flavour: str) -> None:
    if sm is None:
        return
    if flavour != "tensorrt-rtx":
        raise EngineError(
            f"{flavour} builds for the GPU of its own machine only, not for SM {sm}", "Build on the device itself."
        )
    if sm not in (offered := offered_sms()):
        raise EngineError(
            f"TensorRT for RTX does not build for SM {sm}", f"It offers SM {', '.join(map(str, offered))}."
        )


def shapes(
    name: str, shape: tuple[int, ...], workload: Workload, most: int | None = None
) -> tuple[tuple[int, ...], ...]:
    """Minimum, optimum and maximum shape of an input of our graph's contract (-1: dynamic).

    most: the largest batch, if not the workload's.
    The optimum is the decode step in the middle of the context: most of the time is spent there.
    """

    def at(batch: int, sequence: int, past: int) -> tuple[int, ...]:
        if name.startswith("past_key_values."):
            return batch, shape[1], past, shape[3]
        return batch, past + sequence if name == "attention_mask" else sequence

    last = workload.context - 1
    return at(1, 1, 0), at(workload.batch, 1, last // 2), at(most or workload.batch, workload.prompt, last)


class Messages:
    """The builder's and the runtime's messages, kept; its `logger` is what TensorRT takes."""

    def __init__(self, trt: Any) -> None:
        kept: list[tuple[int, str]] = []

        class Keeping(trt.ILogger):
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, text: str) -> None:
                kept.append((int(severity), text))

        self.kept, self.logger = kept, Keeping()

    def errors(self) -> str:
        """The errors so far in one line."""
        errors = [text for severity, text in self.kept if severity <= 1]  # internal errors and errors
        errors = [text for text in errors if not _NO_DRIVER.search(text)] or errors
        return " ".join(" ".join(errors).split())[-600:] or "it does not say why"

    def figures(self) -> dict[str, int]:
        """The memory figures of the last build, in bytes."""
        return {match[1]: int(match[2]) for _, text in self.kept for match in _FIGURE.finditer(text)}


def _monitor(trt: Any, tell: Tell) -> Any:
    """Tells the outermost phases of a build; never stops it."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if not parent_phase:
                self._steps[phase_name] = num_steps
                tell(phase_name, 0, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self._steps:
                tell(phase_name, step + 1, self._steps[phase_name])
            return True

        def phase_finish(self, phase_name: str) -> None:
            if steps := self._steps.pop(phase_name, 0):
                tell(phase_name, steps, steps)

    return Monitor()


def _open_timings(config: Any, path: Path | None) -> Any:
    """The kernels' timings of earlier builds, so that they are not measured again; None: nowhere to keep them."""
    if path is None:
        return None
    known = path.read_bytes() if path.is_file() else b""
    timings = config.create_timing_cache(known)
    if timings is None or not config.set_timing_cache(timings, False):  # of another release or GPU
        timings = config.create_timing_cache(b"")
        config.set_timing_cache(timings, False)
    return timings


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    temporary.write_bytes(content)
    temporary.replace(path)


def _blamed(errors: str, layers: list[str]) -> str:
    """The node that the errors name, with a suffix of TensorRT's or without, not within a word; the longest one."""
    named = [name for name in layers if re.search(rf"(?<![\w./-]){re.escape(name)}(?!\.?[A-Za-z0-9/-])", errors)]
    return f" at node {max(named, key=len)}" if named else ""


def _parser_errors(parser: Any, graph: Path) -> str:
    """The first error, with the node that it is about; errors of the file itself have none."""
    if parser.num_errors == 0:
        return f"TensorRT cannot parse {graph} and does not say why"
    first = parser.get_error(0)
    name = getattr(first, "node_name", str)()  # releases before 10 have no name
    node = f" at node {name} ({first.node_operator()})" if name else ""
    return f"TensorRT cannot parse {graph}{node}: {first.desc()}"


def _warnings(weights: int, graph: Path) -> tuple[str, ...]:
    held = sum(path.stat().st_size for path in graph.parent.glob("*.data"))
    if not weights:
        return ("the builder reported no memory figures",)
    if weights > WEIGHTS_TOLERANCE * held > 0:
        return (f"the engine holds {weights / held:.2f} times the graph's weights: something is stored twice",)
    return ()
