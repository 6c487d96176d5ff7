"""The build of engines with TensorRT or TensorRT for RTX, through one adapter, in a process of its own.

This file also runs on the device: Python 3.10, standard library and one of the two modules. It needs no GPU, because
it neither deserialises nor runs an engine: the memory figures are read from the builder's messages.
"""

from __future__ import annotations

import importlib
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune.cache import read_cached, write_cached
from edgeprune.dialects import LEAST_TENSORRT
from edgeprune.errors import EngineError
from edgeprune.ondevice.figures import Workload
from edgeprune.ondevice.machine import peak_bytes
from edgeprune.ondevice.runtimes import RUNTIMES
from edgeprune.ondevice.worker import OnProgress, quiet

WEIGHTS_TOLERANCE = 1.05  # of the graph's bytes; an engine with more weights stores something twice
COPY_SHARE = 0.75  # of the largest matrix: what a builder's activations vary by is less, a copy is all of it
LEAST_COPY = 2**18  # bytes: what the builds of a small model vary by is less (measured)
_REMEDIES = {  # what TensorRT for RTX 1.7 lacks (measured): an Attention kernel in fp32, all of fp32 on SM 75, ...
    "Attention operation was not supported": "Set `dialect` in the device's profile to primitive, or use "
    "--precision fp16.",
    "FP32 GEMM is not supported": "Use --precision fp16: TensorRT for RTX has no fp32 on this GPU.",
    "HW-specific datatypes: b16": "Use --precision fp16: GPUs before SM 80 have no bf16.",
    "HW-specific datatypes: int4": "Use --weights int8: GPUs before SM 80 have no int4.",
    "(TensorScatter)": f"TensorRT before {LEAST_TENSORRT} has no KV cache in place: fit with --tensorrt VERSION, or "
    "update TensorRT for RTX.",
    "Non-zero zero point": "Use a symmetric format, such as --weights int8 or --weights int4-64.",
}
_SMALLER = "Try a smaller --context or --batch, or another release of TensorRT."
_NO_DRIVER = re.compile(r"cudaError (35|100)\b")  # accompanies any other error on a machine without a GPU
_FIGURE = re.compile(r"(Total Weights Memory|Total Activation Memory|Max Scratch Memory):\s*(\d+)")


@dataclass(frozen=True)
class BuildResult:
    """The builder's figures of an engine: bytes, seconds, its version, and warnings in words.

    A context needs activation_bytes + scratch_bytes. The builder's total activation memory contains the scratch
    memory, which is one of the blocks that are assigned to it; in this class the two are apart.
    """

    version: str
    weights_bytes: int
    activation_bytes: int
    scratch_bytes: int
    seconds: float
    peak_build_bytes: int
    warnings: tuple[str, ...]

    @property
    def context_bytes(self) -> int:
        """The memory that a context needs."""
        return self.activation_bytes + self.scratch_bytes

    @property
    def effort(self) -> str:
        """The time and the peak memory of the build, in words."""
        return f"built in {self.seconds:.0f} s with {self.peak_build_bytes / 2**20:.0f} MiB of memory at its peak"


def import_tensorrt(flavour: str) -> Any:
    """Returns the module of a flavour. Raises EngineError with the command that installs it."""
    try:
        return importlib.import_module(RUNTIMES[flavour].module)
    except Exception as error:  # a missing library is not an ImportError in every release
        raise EngineError(
            f"{flavour} cannot be imported: {error}", f"Install it with: {RUNTIMES[flavour].install_here}"
        ) from None


def available(flavour: str) -> tuple[bool, str]:
    """Returns whether this machine can build engines of a flavour, and the version or the reason why not."""
    try:
        trt = import_tensorrt(flavour)
    except EngineError as error:
        return False, error.message
    return True, f"{RUNTIMES[flavour].module} {trt.__version__}"


def offered_sms() -> list[int]:
    """Returns the compute capabilities that TensorRT for RTX builds for without the GPU. Raises EngineError."""
    trt = import_tensorrt("tensorrt-rtx")
    names = [name for name in dir(trt.ComputeCapability) if re.fullmatch(r"SM\d+", name)]
    return sorted(int(name[2:]) for name in names)


@dataclass(frozen=True)
class Limits:
    """The settings of a build.

    workspace_bytes: the scratch memory that a kernel may take at most. timing_cache: the file of kernel timings.
    """

    workspace_bytes: int | None = None
    timing_cache: Path | None = None


def compile_plan(
    graph: Path,
    plan: Path,
    workload: Workload,
    sm: int | None,
    flavour: str,
    limits: Limits = Limits(),
    on_progress: OnProgress = quiet,
) -> BuildResult:
    """Builds in this process; where the engine stores weights twice, builds again with room for a batch of two.

    With a batch of exactly one TensorRT for RTX 1.7 keeps a transposed second copy of a tied embedding; with a
    maximum of two it does not (measured). The smaller of the two engines is kept. sm: the compute capability to
    build for (TensorRT for RTX only), None: that of this machine's GPU. Raises EngineError that names the node which
    the parser or the builder refuses.
    """
    # Build into temporary files: the plan is complete or absent.
    temporaries = [plan.with_name(f"{plan.name}.{os.getpid()}.{index}.part") for index in range(2)]
    plan.parent.mkdir(parents=True, exist_ok=True)
    try:
        result = _compile(graph, temporaries[0], workload, workload.batch, sm, flavour, limits, on_progress)
        # Build again for two sequences where something is stored twice.
        if result.weights_bytes and result.warnings and workload.batch == 1:
            wider = _compile(graph, temporaries[1], workload, 2, sm, flavour, limits, on_progress)
            if _total_bytes(wider) < _total_bytes(result):
                result, temporaries = wider, temporaries[::-1]
        temporaries[0].replace(plan)
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)
    return result


def _total_bytes(result: BuildResult) -> int:
    return result.weights_bytes + result.context_bytes


def holds_copies(
    context_bytes: float, float_context_bytes: float, largest_matrix_bytes: int, stream_bytes: int
) -> bool:
    """Returns whether a builder dequantises weights of few bits into copies, which takes memory and time at each step.

    Nothing else tells: the weights stay as small as the graph's, and the builder warns of nothing. context_bytes: of an
    engine with weight formats; float_context_bytes: of one without, of the same widths or larger ones;
    largest_matrix_bytes: of the largest matrix with a weight format, if it were floats; stream_bytes: of the residual
    stream of a prefill, of which two builds differ by two at most (measured).
    """
    jump = context_bytes - float_context_bytes
    return largest_matrix_bytes > 0 and jump > max(COPY_SHARE * largest_matrix_bytes, 2 * stream_bytes, LEAST_COPY)


def _compile(
    graph: Path,
    plan: Path,
    workload: Workload,
    most: int,
    sm: int | None,
    flavour: str,
    limits: Limits,
    on_progress: OnProgress,
) -> BuildResult:
    """Builds once, for batches from 1 to `most`, with one merged profile: two profiles would hold the weights twice.

    Raises EngineError.
    """
    trt = import_tensorrt(flavour)
    _check_sm(sm, flavour)
    start = time.monotonic()
    # Parse the graph into a network.
    messages = Messages(trt)
    builder = trt.Builder(messages.logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, messages.logger)
    if not parser.parse_from_file(str(graph)):
        errors = _parser_errors(parser, graph)
        raise EngineError(errors, _remedy(errors, "Export again; a newer TensorRT may support the operator."))
    _check_capacity(network, workload)
    _let_attention_decompose(trt, network)
    # Configure the build: the GPU, the scratch memory, the timings of earlier builds, the progress.
    config = builder.create_builder_config()
    if sm is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), 0)
    if limits.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, limits.workspace_bytes)
    timings = _open_timings(config, limits.timing_cache)
    config.progress_monitor = _monitor(trt, on_progress)
    # Give the profile the shapes of every input.
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        profile.set_shape(tensor.name, *shapes(tensor.name, tuple(tensor.shape), workload, most))
    config.add_optimization_profile(profile)
    # Build; an error names the node and a remedy where one is known.
    if not _build(trt, builder, network, config, plan):
        layers = [network.get_layer(index).name for index in range(network.num_layers)]
        errors = messages.errors()
        raise EngineError(
            f"TensorRT cannot build {graph}{_blamed(errors, layers)}: {errors[-400:]}", _remedy(errors, _SMALLER)
        )
    # Keep the timings, and read the memory figures from the messages.
    if timings is not None:
        write_cached(limits.timing_cache, bytes(config.get_timing_cache().serialize()))
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


def _check_capacity(network: Any, workload: Workload) -> None:
    """Raises EngineError where the graph has a KV cache of a fixed capacity that the workload's context exceeds."""
    inputs = (network.get_input(index) for index in range(network.num_inputs))
    slots = [tensor.shape[2] for tensor in inputs if tensor.name.startswith("past_key_values.")]  # -1: grows
    if slots and 0 <= slots[0] < workload.context:
        raise EngineError(
            f"the graph's KV cache has room for {slots[0]} tokens, not for a context of {workload.context}",
            "Fit again with this --context: an engine that updates its cache in place is built for one.",
        )


def _let_attention_decompose(trt: Any, network: Any) -> None:
    """Allows the builder to decompose attention that has no kernel of its own, which it would refuse otherwise.

    That is attention in fp32, and attention of one token at a time where the heads are 3 or fewer or not a multiple
    of 8. Where there is a kernel, the engine keeps its size (TensorRT for RTX 1.7).
    """
    if not hasattr(trt, "IAttentionOutputLayer"):
        return
    for index in range(network.num_layers):
        if network.get_layer(index).type == trt.LayerType.ATTENTION_OUTPUT:
            output = network.get_layer(index)
            output.__class__ = trt.IAttentionOutputLayer
            output.attention.decomposable = True


def _build(trt: Any, builder: Any, network: Any, config: Any, plan: Path) -> bool:
    """Builds into a file; returns False where the builder refuses. Raises EngineError where the file cannot be written.

    Releases from 10.13 on write while they serialise, which saves a copy of the weights in memory: 5.6 GiB instead of
    6.6 GiB at the peak for 2.1 GiB of weights (measured).
    """
    # Older releases return the whole engine at once.
    if not hasattr(builder, "build_serialized_network_to_stream"):
        serialized = builder.build_serialized_network(network, config)
        if serialized is not None:
            plan.write_bytes(serialized)
        return serialized is not None
    # Later ones pass it piece by piece to a writer, whose errors are kept until the build has ended.
    problems: list[OSError] = []

    class Writer(trt.IStreamWriter):
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)

        def write(self, content: Any) -> int:
            try:
                return file.write(content)
            except OSError as error:  # an exception must not pass through the builder
                problems.append(error)
                return 0

    done = False
    try:
        with plan.open("wb") as file:
            done = builder.build_serialized_network_to_stream(network, config, Writer())
    except OSError as error:  # when the last bytes are written
        problems.append(error)
    if problems:
        raise EngineError(f"the engine cannot be written: {problems[0]}", "Free some space on the disk.")
    return done


def _check_sm(sm: int | None, flavour: str) -> None:
    """Raises EngineError where the flavour does not build for a compute capability; None is that of the GPU."""
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
    """Returns the minimum, optimum and maximum shape of an input of edgeprune's graphs; shape: -1 where it is dynamic.

    most: the largest batch, where it is not the workload's. The optimum is the decode step in the middle of the
    context, because most of the time is spent in such steps.
    """

    def at(batch: int, sequence: int, past: int) -> tuple[int, ...]:
        if name.startswith("past_key_values."):  # (batch, num_key_value_heads, past or capacity, head_dim)
            sizes = batch, shape[1], past, shape[3]
        elif name == "attention_mask":  # (batch, past + sequence) or (batch, capacity)
            sizes = batch, past + sequence
        else:  # (batch, sequence), or (batch,) of write_indices
            sizes = (batch, sequence)[: len(shape)]
        # The capacity of a cache that is updated in place is a number in the graph.
        return tuple(size if asked < 0 else asked for size, asked in zip(sizes, shape, strict=True))

    last = workload.context - 1
    return at(1, 1, 0), at(workload.batch, 1, last // 2), at(most or workload.batch, workload.prompt, last)


class Messages:
    """The messages of the builder and the runtime, which are kept. TensorRT takes its `logger`."""

    def __init__(self, trt: Any) -> None:
        kept: list[tuple[int, str]] = []

        class Keeping(trt.ILogger):
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, text: str) -> None:
                kept.append((int(severity), text))

        self.kept, self.logger = kept, Keeping()

    def errors(self) -> str:
        """Returns the errors so far in one line."""
        errors = [text for severity, text in self.kept if severity <= 1]  # internal errors and ordinary ones
        errors = [text for text in errors if not _NO_DRIVER.search(text)] or errors
        return " ".join(" ".join(errors).split())[-600:] or "no reason is given"

    def figures(self) -> dict[str, int]:
        """Returns the memory figures of the last build by name, in bytes."""
        return {match[1]: int(match[2]) for _, text in self.kept for match in _FIGURE.finditer(text)}


def _monitor(trt: Any, on_progress: OnProgress) -> Any:
    """Returns a monitor that reports the outermost phases of a build, and never stops it."""
    # A phase with a parent is part of another one, and is not reported.

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if not parent_phase:
                self._steps[phase_name] = num_steps
                on_progress(phase_name, 0, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self._steps:
                on_progress(phase_name, step + 1, self._steps[phase_name])
            return True

        def phase_finish(self, phase_name: str) -> None:
            if steps := self._steps.pop(phase_name, 0):
                on_progress(phase_name, steps, steps)

    return Monitor()


def _open_timings(config: Any, path: Path | None) -> Any:
    """Sets a build's cache to the kernel timings of earlier builds, and returns it; None where there is no file."""
    if path is None:
        return None
    timings = config.create_timing_cache(read_cached(path) or b"")
    if timings is None or not config.set_timing_cache(timings, False):  # they are of another release or GPU
        timings = config.create_timing_cache(b"")
        config.set_timing_cache(timings, False)
    return timings


def _blamed(errors: str, layers: list[str]) -> str:
    """Returns the longest node name in the errors, with or without a suffix of TensorRT's, but not within a word."""
    named = [name for name in layers if re.search(rf"(?<![\w./-]){re.escape(name)}(?!\.?[A-Za-z0-9/-])", errors)]
    return f" at node {max(named, key=len)}" if named else ""


def _remedy(errors: str, otherwise: str) -> str:
    """Returns what helps against errors whose cause is known."""
    return next((remedy for text, remedy in _REMEDIES.items() if text in errors), otherwise)


def _parser_errors(parser: Any, graph: Path) -> str:
    """Returns the parser's first error and its node; errors of the file itself have no node."""
    if parser.num_errors == 0:
        return f"TensorRT cannot parse {graph} and gives no reason"
    first = parser.get_error(0)
    name = getattr(first, "node_name", str)()  # releases before 10 have no node_name
    node = f" at node {name} ({first.node_operator()})" if name else ""
    return f"TensorRT cannot parse {graph}{node}: {first.desc()}"


def _warnings(weights: int, graph: Path) -> tuple[str, ...]:
    """Returns warnings about an engine's bytes of weights: that they are unknown, or more than the graph's."""
    graph_bytes = sum(path.stat().st_size for path in graph.parent.glob("*.data"))
    if not weights:
        return ("the builder reported no memory figures",)
    if weights > WEIGHTS_TOLERANCE * graph_bytes > 0:
        return (f"the engine holds {weights / graph_bytes:.2f} times the graph's weights: something is stored twice",)
    return ()
