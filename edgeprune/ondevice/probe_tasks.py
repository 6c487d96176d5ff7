"""The timing of small graphs on the device, by which a profile's bandwidth, compute rate and overhead are measured.

This file also runs on the device: Python 3.10, numpy and the engine's own module. It knows no profiles and no models.
A graph comes without its weights, which would take long to send: random ones are written beside it.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.errors import EngineError
from edgeprune.ondevice import machine
from edgeprune.ondevice.cuda import Cuda
from edgeprune.ondevice.durations import timing
from edgeprune.ondevice.measure import BUILD_SECONDS, TASKS
from edgeprune.ondevice.tensorrt import Messages, import_tensorrt
from edgeprune.ondevice.tensorrt_runner import mapped
from edgeprune.ondevice.worker import OnProgress, ask
from edgeprune.precision import PRECISIONS

MIN_RUNS = 5
RUNS, RUNS_SECONDS = 100, 1.5  # on a processor, whichever ends first
GPU_RUNS, GPU_SECONDS = 100, 2.0
INPUT, OUTPUT = "x", "y"


@dataclass(frozen=True)
class Stack:
    """A graph that multiplies (rows, width) by one square matrix (width, width) after the other."""

    rows: int
    width: int
    matrices: int
    precision: str

    @property
    def matrix_bytes(self) -> int:
        """The bytes of one matrix."""
        return self.width * self.width * PRECISIONS[self.precision].element_bytes

    @property
    def weight_bytes(self) -> int:
        """The bytes of all matrices."""
        return self.matrices * self.matrix_bytes

    @property
    def flops(self) -> int:
        """The floating-point operations of one run; a multiply-add counts as two."""
        return 2 * self.rows * self.width * self.width * self.matrices


def answer(request: dict[str, Any], on_progress: OnProgress) -> dict[str, Any]:
    """Answers one step of a probe: `look` inspects the processor, `time` times the graphs, `build` builds one of them.

    Raises EngineError.
    """
    return {"inspect": _inspect, "time": _time, "build": _build}[request["step"]](request, on_progress)


def _inspect(request: dict[str, Any], on_progress: OnProgress) -> dict[str, Any]:
    """Returns the sizes that the graphs depend on, and the peak bytes of a process with the runtime alone."""
    version = _onnxruntime().__version__
    runtime = machine.peak_bytes()
    return {
        "version": version,
        "runtime": runtime,
        "processor": machine.processor(),
        "memory": total_memory(),
        "cache": largest_cache(),
        "available": machine.memory_state().get("available"),
    }


@dataclass(frozen=True)
class Took:
    """The time of a graph.

    seconds: of the run that counts, the best or the median. spread: the share by which other runs took longer.
    """

    seconds: float
    spread: float


def _time(request: dict[str, Any], on_progress: OnProgress) -> dict[str, Any]:
    """Times every graph, by its role; on a GPU also reads the free memory and what the first context takes of it."""
    load = _load()
    # Check the room for the weights, then write them.
    stacks = {role: Stack(**values) for role, values in request["stacks"].items()}
    paths = {role: Path(path) for role, path in request["files"].items()}
    _check_room(paths, stacks, copies=1 if request["engine"] == "onnxruntime" else 3)
    for done, (role, stack) in enumerate(stacks.items()):
        on_progress("make weights to probe with", done, len(stacks))
        write_weights(stack, paths[role])
    # Time the graphs on the processor or on the GPU.
    if request["engine"] == "onnxruntime":
        took = {}
        for done, (role, stack) in enumerate(stacks.items()):
            on_progress("time the processor", done, len(stacks))
            took[role] = asdict(_on_processor(paths[role], stack))
        timings: dict[str, Any] = {"took": took, "load": load}
    else:
        timings = _on_gpu(request, paths, stacks, on_progress)
    return {**timings, "conditions": machine.conditions()}


def _build(request: dict[str, Any], on_progress: OnProgress) -> dict[str, Any]:
    """Builds the engine of one graph and returns the builder's bytes of weights."""
    plan = Path(request["outputs"]["plan"])
    stack = Stack(**request["stack"])
    return {"weights": compile_stack(Path(request["files"]["graph"]), plan, stack, request["engine"])}


def total_memory() -> float:
    """Returns the bytes of the system's memory. Raises EngineError where they cannot be read."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        raise EngineError(
            f"cannot read the total memory on {platform.system()}",
            "Write the hardware figures into a profile of your own and give it with --profile FILE.",
        ) from None


def largest_cache() -> int:
    """Returns the bytes of the processor's largest cache, 0 where they are unknown."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with contextlib.suppress(OSError, ValueError):
            sizes.append(int(path.read_text(encoding="utf-8").strip().removesuffix("K")) * 1024)
    return max(sizes)


def _load() -> float:
    """Returns the processes that ran or waited over the last minute, for each thread; 0 where they are unknown."""
    try:
        return os.getloadavg()[0] / machine.threads()
    except (AttributeError, OSError):
        return 0.0


def weights_file(graph: Path) -> Path:
    """Returns the file that a graph reads its weights from."""
    return graph.with_name(f"{graph.name}.data")


def write_weights(stack: Stack, graph: Path) -> None:
    """Writes random weights that keep the variance of their input, so that no product leaves the range of fp16.

    No two matrices are equal, so that an engine cannot store one for two of them.
    """
    generator = np.random.default_rng(0)
    with weights_file(graph).open("wb") as file:
        for _ in range(stack.matrices):
            values = generator.random((stack.width, stack.width), dtype=np.float32)
            values -= np.float32(0.5)
            values *= np.float32(2 * sqrt(3 / stack.width))
            file.write(in_precision(values, stack.precision))


def in_precision(values: np.ndarray, precision: str) -> np.ndarray:
    """Returns fp32 values in the type of a precision, of the same shape.

    bf16 values are their upper halves as uint16, not rounded: the times do not depend on it.
    """
    if precision == "bf16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(PRECISIONS[precision].numpy_dtype, copy=False)


def _check_room(paths: dict[str, Path], stacks: dict[str, Stack], copies: int) -> None:
    """Raises EngineError where memory or disk lack room for the weights and for what the runtime makes of them.

    copies: of all weights on the disk, those in engines included.
    """
    largest = max(stack.weight_bytes for stack in stacks.values())
    available = machine.memory_state().get("available", 0)
    if 0 < available < 4 * largest:
        raise EngineError(
            f"probing needs {4 * largest / 2**20:.0f} MiB of memory, {available / 2**20:.0f} MiB are available",
            "Close what else runs there, and probe again.",
        )
    needed = copies * sum(stack.weight_bytes for stack in stacks.values())
    folder = next(iter(paths.values())).parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise EngineError(
            f"probing writes {needed / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free for {folder}",
            "Free some space there, and probe again.",
        )


def _onnxruntime() -> Any:
    """Returns the module. Raises EngineError where it cannot be imported."""
    try:
        import onnxruntime
    except Exception as error:  # a missing library is not an ImportError in every release
        raise EngineError(
            f"onnxruntime cannot be imported: {error}", "Install it with: python3 -m pip install onnxruntime"
        ) from None
    return onnxruntime


def _on_processor(graph: Path, stack: Stack) -> Took:
    """Times a graph in ONNX Runtime on the processor. Raises EngineError."""
    try:
        session = _onnxruntime().InferenceSession(str(graph), providers=["CPUExecutionProvider"])
        values = in_precision(np.ones((stack.rows, stack.width), np.float32), stack.precision)
        return best(lambda: session.run(None, {INPUT: values}))
    except EngineError:
        raise
    except Exception as error:  # ONNX Runtime's own exceptions share no public base
        raise EngineError(f"ONNX Runtime cannot run the probe: {error}", "Update onnxruntime there.") from None


def best(run: Callable[[], Any]) -> Took:
    """Times some runs, of which the shortest counts: other processes can only lengthen one. The spread is the median's.

    The first run is not timed.
    """
    run()
    times: list[float] = []
    while len(times) < MIN_RUNS or (len(times) < RUNS and sum(times) < RUNS_SECONDS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return Took(min(times), float(np.median(times)) / min(times) - 1)


def compile_stack(graph: Path, plan: Path, stack: Stack, flavour: str, sm: int | None = None) -> int:
    """Builds the engine of a probe's graph for its number of rows alone; returns the builder's bytes of weights.

    sm: the compute capability to build for (TensorRT for RTX only), None: that of this machine's GPU. Raises
    EngineError.
    """
    trt = import_tensorrt(flavour)
    messages = Messages(trt)
    builder = trt.Builder(messages.logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, messages.logger)
    serialized = None
    # Parse and build; both report their errors through the messages.
    if parser.parse_from_file(str(graph)):
        config = builder.create_builder_config()
        if sm is not None:
            config.num_compute_capabilities = 1
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), 0)
        profile = builder.create_optimization_profile()
        profile.set_shape(INPUT, *[(stack.rows, stack.width)] * 3)
        config.add_optimization_profile(profile)
        serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise EngineError(
            f"{flavour} {trt.__version__} cannot build a product of matrices: {messages.errors()}",
            "Close what else uses the GPU and its memory; if it persists, install TensorRT anew.",
        )
    # The weights' bytes are in the builder's messages.
    plan.write_bytes(serialized)
    return messages.figures().get("Total Weights Memory", 0)


def _on_gpu(
    request: dict[str, Any], paths: dict[str, Path], stacks: dict[str, Stack], on_progress: OnProgress
) -> dict[str, Any]:
    """Builds every graph and times it on the GPU; reads the free memory and what the first context takes of it.

    Each build is a process of its own, whose memory is free again when this one opens its first context. Raises
    EngineError.
    """
    # Build the engines.
    flavour = request["engine"]
    for done, (role, stack) in enumerate(stacks.items()):
        on_progress("build engines to probe with", done, len(stacks))
        ask(
            TASKS,
            {
                "task": f"the build of {paths[role].name}",
                "do": "probe",
                "step": "build",
                "engine": flavour,
                "files": {"graph": str(paths[role])},
                "outputs": {"plan": str(_plan(paths[role]))},
                "stack": asdict(stack),
            },
            BUILD_SECONDS,
            on_progress,
        )
    # Time them, and compare the free memory before and after the first one.
    before = _free_bytes(request["shared"])
    took, taken = {}, None
    with Cuda() as cuda:
        trt = import_tensorrt(flavour)
        # The smallest goes first: the memory that is taken after its run is that of the context and the runtime.
        for done, role in enumerate(sorted(stacks, key=lambda role: stacks[role].weight_bytes)):
            on_progress("time the GPU", done, len(stacks))
            with _Opened(cuda, trt, _plan(paths[role]), stacks[role]) as opened:
                took[role] = asdict(_typical(cuda, opened.step))
                if done == 0 and before is not None and (after := _free_bytes(request["shared"])) is not None:
                    taken = before - after if before > after else None
        gpu = asdict(cuda.gpu)
    return {"took": took, "free": before, "runtime": taken, "gpu": gpu, "version": trt.__version__}


def _plan(graph: Path) -> Path:
    return graph.with_suffix(".engine")


def _free_bytes(shared: bool) -> int | None:
    """Returns the bytes that the GPU has free, read without a context; None where they are unknown.

    shared: whether GPU and CPU share their memory.
    """
    if shared:
        return machine.memory_state().get("available")
    command = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return int(result.stdout.splitlines()[0]) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def _typical(cuda: Cuda, step: Callable[[], None]) -> Took:
    """Times some runs by the GPU's own clock, after a warm-up; the median counts, the spread is the p90's."""
    spent, count = 0.0, 0
    while spent < 1e3 * timing().warm_up_seconds and count < 10_000 or count < 3:
        spent += max(cuda.time_ms(step))
        count += 1
    times: list[float] = []
    while len(times) < MIN_RUNS or (len(times) < GPU_RUNS and sum(times) < 1e3 * GPU_SECONDS):
        times.append(cuda.time_ms(step)[0])
    median, most = np.percentile(times, [50, 90])
    return Took(float(median) / 1e3, float(most / median) - 1)


class _Opened:
    """An engine on the GPU with its input and output. `with` frees the engine; Cuda frees the buffers."""

    def __init__(self, cuda: Cuda, trt: Any, plan: Path, stack: Stack) -> None:
        self._cuda, self._messages = cuda, Messages(trt)
        self._engine = self._context = None
        self._runtime = trt.Runtime(self._messages.logger)
        try:
            self._open(plan, stack)
        except BaseException:
            self._close()
            raise

    def _open(self, plan: Path, stack: Stack) -> None:
        """Loads the engine and binds its buffers. Raises EngineError."""
        # Load the engine and create its context.
        with mapped(plan) as content:
            self._engine = self._runtime.deserialize_cuda_engine(content)
        self._context = None if self._engine is None else self._engine.create_execution_context()
        if self._context is None:
            raise EngineError(
                f"the engine to probe {self._cuda.gpu.name} with cannot be opened: {self._messages.errors()}",
                "Close what else uses the GPU, and probe again.",
            )
        # Bind input and output, both (rows, width).
        values = in_precision(np.ones((stack.rows, stack.width), np.float32), stack.precision)
        source, result = self._cuda.allocate(values.nbytes), self._cuda.allocate(values.nbytes)
        self._cuda.upload(source, values)
        accepted = (
            self._context.set_input_shape(INPUT, values.shape),
            self._context.set_tensor_address(INPUT, source),
            self._context.set_tensor_address(OUTPUT, result),
        )
        if not all(accepted):
            raise self._refused()

    def step(self) -> None:
        """Puts a run on the stream. Raises EngineError where TensorRT refuses it."""
        if not self._context.execute_async_v3(self._cuda.stream):
            raise self._refused()

    def _refused(self) -> EngineError:
        return EngineError(
            f"TensorRT refuses a step of the probe: {self._messages.errors()}", "Run `edgeprune doctor` there."
        )

    def __enter__(self) -> _Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        """Frees the engine in the order that TensorRT requires, after the work that still runs."""
        if self._context is not None:
            with contextlib.suppress(EngineError):  # the failure of a GPU was reported at the step
                self._cuda.synchronize()
        self._context = self._engine = self._runtime = None  # from left to right
