"""Hardware figures, measured: of this machine's processor on first use, cached for it; of any device when asked.

What an estimate needs is what the engine reaches: the bandwidth of reading weights that fit in no cache for
one row (decode), and the rate of a matrix product (prefill). The graphs are written here and timed on the
device, which may be this machine, by probing.py. It knows nothing about models.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from edgeprune.cache import cache_folder
from edgeprune.ondevice.machine import processor
from edgeprune.ondevice.measure import Here, Session
from edgeprune.ondevice.probe_tasks import INPUT, OUTPUT, Stack, Took, largest_cache, total_memory, weights_file
from edgeprune.ondevice.worker import Tell, quiet
from edgeprune.precision import PRECISIONS
from edgeprune.profiles import DeviceProfile

VERSION = 2  # of this way of probing; figures of another version are measured again
WIDTH = 4096  # a matrix is WIDTH x WIDTH: 64 MiB in fp32, 32 MiB in fp16
CALL_WIDTH = 8
ROWS = 256  # of a product on a processor
GPU_ROWS, GPU_MATRICES = 2048, 4
SMALLEST_READ, LARGEST_READ = 256 * 2**20, 1024 * 2**20  # bytes; the device holds them twice or three times
GPU_READ = 512 * 2**20  # bytes; GPUs with memory of their own have caches of up to 128 MiB, the others of 32
LOOK_SECONDS, PROBE_SECONDS = 120.0, 3600.0
SETTLED = 0.15  # spread of the runs beyond which a figure is of low confidence
BUSY = 0.5  # processes of others for each thread, beyond which figures of a processor are
OPSET, IR_VERSION = 17, 8  # what every engine's parser knows

Figures = dict[str, dict[str, Any]]  # HardwareFigure fields by name


@dataclass(frozen=True)
class Probed:
    """Figures of a device, and the state that it was in."""

    figures: Figures
    conditions: dict[str, str]


def with_figures(profile: DeviceProfile) -> DeviceProfile:
    """Returns the profile as it is where it has hardware figures, else with those of this machine."""
    return profile if profile.is_probed else probe(profile)


def probe(profile: DeviceProfile) -> DeviceProfile:
    """The profile with this machine's figures: from the cache, else measured now (some seconds) and cached.

    Raises EngineError where the system does not tell its memory or ONNX Runtime cannot start.
    """
    import onnxruntime

    machine = f"{processor()}, {total_memory() / 2**30:.0f} GiB, onnxruntime {onnxruntime.__version__}"
    path = cache_folder() / "probe.json"
    key = f"{machine}, probe {VERSION}"
    known = _read(path)
    try:
        return _with(profile, known[key])
    except (KeyError, TypeError, ValidationError):  # unknown, or not what we wrote
        known[key] = measure(_source("onnxruntime", onnxruntime.__version__, processor(), {}))
    with contextlib.suppress(OSError):  # without a writable cache it is measured at each run
        _write(path, known)
    return _with(profile, known[key])


def measure(source: str) -> Figures:
    """All figures that an estimate for ONNX Runtime needs; `source` says what was measured where."""
    stacks = _stacks("fp32", ROWS, 1, _matrices())
    answer = _time(Here(), "onnxruntime", stacks, quiet)
    return _processor_figures(source, stacks, answer, total_memory(), runtime_bytes())


def runtime_bytes() -> float:
    """Resident bytes, at its peak, of a fresh process that has loaded the runtime and nothing else."""
    return float(_look(Here(), quiet)["runtime"])


def probe_processor(session: Session, tell: Tell) -> Probed:
    """What ONNX Runtime reaches on the processor of a device. Raises EngineError."""
    seen = _look(session, tell)
    stacks = _stacks("fp32", ROWS, 1, _matrices_for(seen["cache"]))
    answer = _time(session, "onnxruntime", stacks, tell)
    source = _source("onnxruntime", seen["version"], seen["processor"], answer["conditions"])
    figures = _processor_figures(source, stacks, answer, seen["memory"], seen["runtime"])
    return Probed(figures, answer["conditions"])


def probe_gpu(session: Session, flavour: str, device: str, like: DeviceProfile, tell: Tell) -> Probed:
    """What TensorRT reaches on a GPU in the precision of `like`, whose figures stay where the driver tells none.

    Raises EngineError where nothing can be built, or run.
    """
    shared = like.memory_shared_with_system
    read = SMALLEST_READ if shared else GPU_READ
    matrices = -(-read // Stack(1, WIDTH, 1, like.precision).weight_bytes)
    stacks = _stacks(like.precision, GPU_ROWS, GPU_MATRICES, matrices)
    answer = _time(session, flavour, stacks, tell, shared)
    source = _source(flavour, answer["version"], device, answer["conditions"])
    return Probed(_gpu_figures(source, stacks, answer, like), answer["conditions"])


def _source(engine: str, version: str, device: str, conditions: dict[str, str]) -> str:
    mode = conditions.get("power mode")
    return f"measured with {engine} {version} on {device}{f', {mode}' if mode else ''}"


def _figure(value: float, unit: str, source: str, confidence: str = "medium") -> dict[str, Any]:
    """Bytes are exact; of what was timed five digits are more than hold."""
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
    total, free = answer["gpu"]["memory"], answer["free"]
    figures = {"memory": _figure(total, "B", f"{source}: the driver's total", "high")}
    usable, basis = total, "all of the device's memory"
    if like.memory_shared_with_system:
        reserve, basis = like.system_reserve, "all that the system leaves, with nothing else loaded"
        usable, figures["system_reserve"] = total - reserve.si, reserve.model_dump()
        if free and free < total:
            said = f"{source}: the driver's total less what /proc/meminfo called available"
            usable, figures["system_reserve"] = free, _figure(total - free, "B", said)
    figures["build_memory"] = _figure(usable, "B", f"{source}: {basis}", "low")
    figures["runtime_memory"] = like.runtime_memory.model_dump()
    if answer["runtime"]:
        said = f"{source}: what became less free with the first context and engine"
        figures["runtime_memory"] = _figure(answer["runtime"], "B", said)
    return figures | _rates(source, stacks, answer["took"])


def _rates(source: str, stacks: dict[str, Stack], took: dict[str, Took], load: float = 0.0) -> Figures:
    """Bandwidth, compute and overhead; both shares are 1: what was measured is what such products reach.

    load: of other programs, in processes for each thread.
    """

    def timed(value: float, unit: str, what: str, role: str) -> dict[str, Any]:
        doubts = f"; other runs took {100 * took[role].spread:.0f} % longer" if took[role].spread > SETTLED else ""
        doubts += f"; the load before was {load:.1f} processes a thread" if load > BUSY else ""
        return _figure(value, unit, f"{source}: {what}{doubts}", "low" if doubts else "medium")

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
    """How many matrices this machine's processor has to read."""
    return _matrices_for(largest_cache())


def _matrices_for(cache: int) -> int:
    """Four times the largest cache, within bounds."""
    return -(-min(max(4 * cache, SMALLEST_READ), LARGEST_READ) // Stack(1, WIDTH, 1, "fp32").weight_bytes)


def _stacks(precision: str, rows: int, factors: int, matrices: int) -> dict[str, Stack]:
    return {
        "call": Stack(1, CALL_WIDTH, 1, precision),
        "read": Stack(1, WIDTH, matrices, precision),
        "product": Stack(rows, WIDTH, factors, precision),
    }


def _look(session: Session, tell: Tell) -> dict[str, Any]:
    request = {"task": "the look at the processor", "do": "probe", "step": "look"}
    return session.run(request, LOOK_SECONDS, tell)


def _time(session: Session, engine: str, stacks: dict[str, Stack], tell: Tell, shared: bool = False) -> dict[str, Any]:
    """The answer of the device, with what each graph took."""
    with tempfile.TemporaryDirectory() as folder:
        graphs = {role: Path(folder) / f"{role}.onnx" for role in stacks}
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
        answer = session.run(request, PROBE_SECONDS, tell)
    return {**answer, "took": {role: Took(**values) for role, values in answer["took"].items()}}


def write_graph(stack: Stack, path: Path) -> None:
    """The graph of a stack; its weights are to stand in `weights_file`, one matrix after the other."""
    from onnx import TensorProto, helper, save_model

    element = getattr(TensorProto, PRECISIONS[stack.precision].onnx_type)
    size = stack.matrix_bytes
    weights = []
    for index in range(stack.matrices):
        weight = TensorProto(
            name=f"w{index}", data_type=element, dims=(stack.width, stack.width), data_location=TensorProto.EXTERNAL
        )
        where = {"location": weights_file(path).name, "offset": index * size, "length": size}
        for key, value in where.items():
            weight.external_data.add(key=key, value=str(value))
        weights.append(weight)
    names = [INPUT, *(f"y{index}" for index in range(1, stack.matrices)), OUTPUT]
    steps = zip(names, weights, names[1:], strict=False)
    nodes = [helper.make_node("MatMul", [left, weight.name], [right], weight.name) for left, weight, right in steps]
    ends = [helper.make_tensor_value_info(name, element, ["rows", stack.width]) for name in (INPUT, OUTPUT)]
    graph = helper.make_graph(nodes, "probe", ends[:1], ends[1:], weights)
    opset = helper.make_opsetid("", OPSET)
    save_model(helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION), path)


def _with(profile: DeviceProfile, figures: Figures) -> DeviceProfile:
    return DeviceProfile.model_validate(profile.model_dump() | figures)


def _read(path: Path) -> dict[str, Figures]:
    """What was cached; a cache that cannot be read is made again."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _write(path: Path, known: dict[str, Figures]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(known, indent=2), encoding="utf-8")
    temporary.replace(path)
