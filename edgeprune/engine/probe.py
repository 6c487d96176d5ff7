"""The measurement of hardware figures: of this machine's processor on first use, and of any device on demand.

It does not know models. An estimate needs the figures that the engine reaches: the bandwidth of reading weights that
do not fit into a cache for one row (decode), and the rate of a matrix product (prefill). The graphs are written on
this machine and timed on the device, which may be this machine too, by ondevice/probe_tasks.py. The figures of this
machine are cached.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from edgeprune.cache import cache_folder, read_cached, write_cached
from edgeprune.engine.answers import ThisMachine
from edgeprune.files import scratch_folder
from edgeprune.ondevice.machine import processor
from edgeprune.ondevice.measure import Session
from edgeprune.ondevice.probe_tasks import INPUT, OUTPUT, Stack, Took, largest_cache, total_memory, weights_file
from edgeprune.ondevice.worker import OnProgress, quiet
from edgeprune.precision import PRECISIONS
from edgeprune.profiles import DeviceProfile

VERSION = 2  # of the method; figures of another version are measured again
WIDTH = 4096  # a matrix is WIDTH x WIDTH: 64 MiB in fp32, 32 MiB in fp16
CALL_WIDTH = 8
ROWS = 256  # rows of a product on a processor
GPU_ROWS, GPU_MATRICES = 2048, 4
SMALLEST_READ, LARGEST_READ = 256 * 2**20, 1024 * 2**20  # bytes; the device holds them twice or three times
GPU_READ = 512 * 2**20  # bytes; GPUs with memory of their own have caches of up to 128 MiB, the others of 32
INSPECT_SECONDS, PROBE_SECONDS = 120.0, 3600.0
SETTLED = 0.15  # spread of the runs beyond which a figure is of low confidence
BUSY = 0.5  # processes of other programs for each thread beyond which a figure is of low confidence
OPSET, IR_VERSION = 17, 8  # that every engine's parser knows

Figures = dict[str, dict[str, Any]]  # HardwareFigure fields by name


@dataclass(frozen=True)
class Probed:
    """The figures of a device, and the conditions of their measurement."""

    figures: Figures
    conditions: dict[str, str]


def with_figures(profile: DeviceProfile) -> DeviceProfile:
    """Returns the profile as it is where it has hardware figures, else with those of this machine."""
    return profile if profile.is_probed else probe(profile)


def probe(profile: DeviceProfile) -> DeviceProfile:
    """Returns the profile with this machine's figures: from the cache, else measured now (some seconds) and cached.

    Raises EngineError where the size of the memory is unknown or ONNX Runtime cannot start.
    """
    import onnxruntime

    machine = f"{processor()}, {total_memory() / 2**30:.0f} GiB, onnxruntime {onnxruntime.__version__}"
    path = cache_folder() / "probe.json"
    key = f"{machine}, probe {VERSION}"
    known = _known(path)
    try:
        return _with(profile, known[key])
    except (KeyError, TypeError, ValidationError):  # not cached, or not in our format
        known[key] = measure(_source("onnxruntime", onnxruntime.__version__, processor(), {}))
    write_cached(path, json.dumps(known, indent=2).encode())
    return _with(profile, known[key])


def measure(source: str) -> Figures:
    """Returns all figures of this machine's processor that an estimate needs.

    source: a phrase for where and with what they are measured. Raises EngineError.
    """
    stacks = _stacks("fp32", ROWS, 1, _matrices())
    answer = _time(ThisMachine(), "onnxruntime", stacks, quiet)
    return _processor_figures(source, stacks, answer, total_memory(), runtime_bytes())


def runtime_bytes() -> float:
    """Returns the resident bytes, at their peak, of a fresh process that has loaded only the runtime."""
    return float(_inspect(ThisMachine(), quiet)["runtime"])


def probe_processor(session: Session, on_progress: OnProgress) -> Probed:
    """Returns the figures that ONNX Runtime reaches on the processor of a device. Raises EngineError."""
    description = _inspect(session, on_progress)
    stacks = _stacks("fp32", ROWS, 1, _matrices_for(description["cache"]))
    answer = _time(session, "onnxruntime", stacks, on_progress)
    source = _source("onnxruntime", description["version"], description["processor"], answer["conditions"])
    figures = _processor_figures(source, stacks, answer, description["memory"], description["runtime"])
    return Probed(figures, answer["conditions"])


def probe_gpu(session: Session, flavour: str, device: str, like: DeviceProfile, on_progress: OnProgress) -> Probed:
    """Returns the figures that TensorRT reaches on a GPU.

    flavour: the engine's name; device: the GPU's; like: a profile whose precision is measured, and whose figures stay
    where the driver gives none. Raises EngineError where nothing can be built or run.
    """
    shared = like.memory_shared_with_system
    read = SMALLEST_READ if shared else GPU_READ
    matrices = -(-read // Stack(1, WIDTH, 1, like.precision).weight_bytes)
    stacks = _stacks(like.precision, GPU_ROWS, GPU_MATRICES, matrices)
    answer = _time(session, flavour, stacks, on_progress, shared)
    source = _source(flavour, answer["version"], device, answer["conditions"])
    return Probed(_gpu_figures(source, stacks, answer, like), answer["conditions"])


def _source(engine: str, version: str, device: str, conditions: dict[str, str]) -> str:
    """Returns the phrase for where and with what figures are measured."""
    mode = conditions.get("power mode")
    return f"measured with {engine} {version} on {device}{f', {mode}' if mode else ''}"


def _figure(value: float, unit: str, source: str, confidence: str = "medium") -> dict[str, Any]:
    """Returns the fields of a figure; bytes are exact, times have five digits, more than are certain."""
    value = float(value) if unit == "B" else float(f"{value:.5g}")
    return {"value": value, "unit": unit, "source": source, "confidence": confidence}


def _processor_figures(
    source: str, stacks: dict[str, Stack], answer: dict[str, Any], memory: float, runtime: float
) -> Figures:
    whole = f"{source}: the operating system's total; other programs share it"
    return {
        "memory": _figure(memory, "B", whole, "high"),
        "build_memory": _figure(memory, "B", whole, "low"),
        "runtime_memory": _figure(runtime, "B", f"{source}: resident bytes of a process with the runtime alone"),
        **_rates(source, stacks, answer["took"], answer["load"]),
    }


def _gpu_figures(source: str, stacks: dict[str, Stack], answer: dict[str, Any], like: DeviceProfile) -> Figures:
    """Returns the figures of a GPU from the device's answer."""
    # The memory that is usable: the whole, or what the system leaves where the memory is shared with it.
    total, free = answer["gpu"]["memory"], answer["free"]
    figures = {"memory": _figure(total, "B", f"{source}: the driver's total", "high")}
    usable, basis = total, "all of the device's memory"
    if like.memory_shared_with_system:
        reserve, basis = like.system_reserve, "all that the system leaves, with nothing else loaded"
        usable, figures["system_reserve"] = total - reserve.si, reserve.model_dump()
        if free and free < total:
            basis_free = f"{source}: the driver's total less the memory that is available in /proc/meminfo"
            usable, figures["system_reserve"] = free, _figure(total - free, "B", basis_free)
    # The memory for building, and that of the runtime.
    figures["build_memory"] = _figure(usable, "B", f"{source}: {basis}", "low")
    figures["runtime_memory"] = like.runtime_memory.model_dump()
    if answer["runtime"]:
        basis_runtime = f"{source}: the free memory that the first context and engine took"
        figures["runtime_memory"] = _figure(answer["runtime"], "B", basis_runtime)
    return figures | _rates(source, stacks, answer["took"])


def _rates(source: str, stacks: dict[str, Stack], took: dict[str, Took], load: float = 0.0) -> Figures:
    """Returns bandwidth, compute and overhead. Both efficiencies are 1: the figures are those that products reach.

    took: the time of each stack; load: of other programs, in processes for each thread.
    """

    def timed(value: float, unit: str, what: str, role: str) -> dict[str, Any]:
        """Returns a figure of what was timed, of low confidence where the times are doubtful."""
        doubts = f"; other runs took {100 * took[role].spread:.0f} % longer" if took[role].spread > SETTLED else ""
        doubts += f"; the load before was {load:.1f} processes a thread" if load > BUSY else ""
        return _figure(value, unit, f"{source}: {what}{doubts}", "low" if doubts else "medium")

    # The basis of each figure in words.
    read, product = stacks["read"], stacks["product"]
    reading = f"{read.weight_bytes / 2**20:.0f} MiB of weights times one row"
    product_of = f"product of {product.rows} x {product.width} and {product.width} x {product.width}"
    overhead = f"{source}: a call of a graph of one small node, of which a model has many"
    rate = PRECISIONS[product.precision].compute
    return {
        "bandwidth": timed(read.weight_bytes / took["read"].seconds / 1e9, "GB/s", reading, "read"),
        rate: timed(product.flops / took["product"].seconds / 1e9, "GFLOP/s", product_of, "product"),
        "decode_efficiency": _figure(1.0, "1", f"{source}: the bandwidth is what such a product reaches", "low"),
        "decode_overhead": _figure(1e3 * took["call"].seconds, "ms", overhead, "low"),
        "prefill_efficiency": _figure(1.0, "1", f"{source}: the rate is what such a product reaches", "low"),
    }


def _matrices() -> int:
    """Returns how many matrices are read on this machine's processor."""
    return _matrices_for(largest_cache())


def _matrices_for(cache: int) -> int:
    """Returns how many matrices make four times the largest cache (bytes), within bounds."""
    return -(-min(max(4 * cache, SMALLEST_READ), LARGEST_READ) // Stack(1, WIDTH, 1, "fp32").weight_bytes)


def _stacks(precision: str, rows: int, factors: int, matrices: int) -> dict[str, Stack]:
    """Returns the graphs to time: a small call, reading `matrices`, and products of `rows` with `factors`."""
    return {
        "call": Stack(1, CALL_WIDTH, 1, precision),
        "read": Stack(1, WIDTH, matrices, precision),
        "product": Stack(rows, WIDTH, factors, precision),
    }


def _inspect(session: Session, on_progress: OnProgress) -> dict[str, Any]:
    """Returns the description of a device's processor, memory and runtime."""
    request = {"task": "the inspection of the processor", "do": "probe", "step": "inspect"}
    return session.run(request, INSPECT_SECONDS, on_progress)


def _time(
    session: Session, engine: str, stacks: dict[str, Stack], on_progress: OnProgress, shared: bool = False
) -> dict[str, Any]:
    """Times the graphs on the device; returns its answer, with the time of each graph. Raises EngineError."""
    with scratch_folder() as folder:
        graphs = {role: folder / f"{role}.onnx" for role in stacks}
        for role, stack in stacks.items():
            write_graph(stack, graphs[role])
        request = {
            "task": "the probe",
            "do": "probe",
            "step": "time",
            "engine": engine,
            "shared": shared,
            "files": {role: str(path) for role, path in graphs.items()},
            "stacks": {role: asdict(stack) for role, stack in stacks.items()},
        }
        answer = session.run(request, PROBE_SECONDS, on_progress)
    return {**answer, "took": {role: Took(**values) for role, values in answer["took"].items()}}


def write_graph(stack: Stack, path: Path) -> None:
    """Writes the graph of a stack, which refers to its weights in `weights_file`, one matrix after the other."""
    # The weights.
    from onnx import TensorProto, helper, save_model

    element = getattr(TensorProto, PRECISIONS[stack.precision].onnx_type)
    size = stack.matrix_bytes
    weights = []
    for index in range(stack.matrices):
        weight = TensorProto(
            name=f"w{index}", data_type=element, dims=(stack.width, stack.width), data_location=TensorProto.EXTERNAL
        )
        entries = {"location": weights_file(path).name, "offset": index * size, "length": size}
        for key, value in entries.items():
            weight.external_data.add(key=key, value=str(value))
        weights.append(weight)
    # A product with each of them, in a row.
    names = [INPUT, *(f"y{index}" for index in range(1, stack.matrices)), OUTPUT]
    steps = zip(names, weights, names[1:], strict=False)
    nodes = [helper.make_node("MatMul", [left, weight.name], [right], weight.name) for left, weight, right in steps]
    ends = [helper.make_tensor_value_info(name, element, ["rows", stack.width]) for name in (INPUT, OUTPUT)]
    graph = helper.make_graph(nodes, "probe", ends[:1], ends[1:], weights)
    opset = helper.make_opsetid("", OPSET)
    save_model(helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION), path)


def _with(profile: DeviceProfile, figures: Figures) -> DeviceProfile:
    return DeviceProfile.model_validate(profile.model_dump() | figures)


def _known(path: Path) -> dict[str, Figures]:
    """Returns the cached figures by machine; none where the cache cannot be read, and is then made again."""
    try:
        known = json.loads(read_cached(path) or b"")
    except (ValueError, RecursionError):
        return {}
    return known if isinstance(known, dict) else {}
