"""Hardware figures of this machine's processor, measured on first use and cached for it.

What an estimate needs is what ONNX Runtime reaches: the bandwidth of reading weights that fit in no
cache for one row (decode), and the rate of a matrix product (prefill), with its default threads. It
knows nothing about models.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from edgeprune.cache import cache_folder
from edgeprune.errors import EngineError, InputError
from edgeprune.profiles import DeviceProfile, load_profile, load_profile_file

VERSION = 1  # of this way of probing; figures of another version are measured again
WIDTH = 4096  # a matrix is WIDTH x WIDTH fp32, 64 MiB
ROWS = 256
REPEATS = 5
SMALLEST_READ, LARGEST_READ = 256 * 2**20, 1024 * 2**20  # bytes; a serialised graph holds at most 2 GiB

Figures = dict[str, dict[str, Any]]  # HardwareFigure fields by name


def resolve_profile(name: str | None, file: Path | None) -> DeviceProfile:
    """The named or the given profile (`cpu` by default), measured where it has no hardware figures.

    Raises InputError for a bad name or file, or both at once.
    """
    if name is not None and file is not None:
        raise InputError(f"both the device {name!r} and the profile {file} are given", "Give one of them.")
    profile = load_profile_file(file) if file is not None else load_profile(name or "cpu")
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
        known[key] = measure(f"measured with onnxruntime {onnxruntime.__version__} on {processor()}")
    with contextlib.suppress(OSError):  # without a writable cache it is measured at each run
        _write(path, known)
    return _with(profile, known[key])


def processor() -> str:
    """The processor's model name, and how many threads this process may use at once."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.lower().startswith(("model name", "hardware")):
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {threads()} threads"


def threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def total_memory() -> float:
    """Bytes. Raises EngineError where the system does not say."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        raise EngineError(
            f"cannot read the total memory on {platform.system()}",
            "Write the hardware figures into a profile of your own and give it with --profile FILE.",
        ) from None


def measure(source: str) -> Figures:
    """All figures that an estimate for ONNX Runtime needs; `source` says what was measured where."""

    def figure(value: float, unit: str, source: str = source, confidence: str = "medium") -> dict[str, Any]:
        return {"value": value, "unit": unit, "source": source, "confidence": confidence}

    matrices = _matrices()
    read = 4 * WIDTH * WIDTH * matrices
    decode = _session(matrices, WIDTH)
    read_seconds = _best_seconds(lambda: decode(1))
    product = _session(1, WIDTH)
    product_seconds = _best_seconds(lambda: product(ROWS))
    call = _session(1, 8)
    memory, runtime = total_memory(), runtime_bytes()
    whole = "the operating system's total; other programs share it"
    return {
        "memory": figure(memory, "B", whole, "high"),
        "build_memory": figure(memory, "B", whole, "low"),
        "runtime_memory": figure(runtime, "B", f"{source}: resident bytes of a process with the runtime alone"),
        "bandwidth": figure(
            read / read_seconds / 1e9, "GB/s", f"{source}: {read / 2**20:.0f} MiB of weights times one row"
        ),
        "fp32_compute": figure(
            2 * ROWS * WIDTH * WIDTH / product_seconds / 1e9,
            "GFLOP/s",
            f"{source}: product of {ROWS} x {WIDTH} and {WIDTH} x {WIDTH}",
        ),
        "decode_efficiency": figure(1.0, "1", "the bandwidth is what such a product reaches", "low"),
        "decode_overhead": figure(
            1e3 * _best_seconds(lambda: call(1)), "ms", f"{source}: a call of a graph of one small node", "low"
        ),
        "prefill_efficiency": figure(1.0, "1", "the rate is what such a product reaches", "low"),
    }


def runtime_bytes() -> float:
    """Resident bytes, at its peak, of a fresh process that has loaded the runtime and nothing else.

    Linux' peak comes from /proc: ru_maxrss of a child begins at its parent's size.
    """
    code = (
        "import pathlib, onnxruntime\n"
        "status = pathlib.Path('/proc/self/status')\n"
        "if status.exists():\n"
        "    print(next(int(s.split()[1]) * 1024 for s in status.read_text().splitlines() if s.startswith('VmHWM')))\n"
        "else:\n"
        "    import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    try:
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    except (OSError, subprocess.SubprocessError) as error:
        raise EngineError(
            f"a process that loads ONNX Runtime did not end well: {error}", "Install it anew: pip install onnxruntime"
        ) from None
    return float(result.stdout)


def _matrices() -> int:
    """How many matrices to read: four times the largest cache, within bounds."""
    caches = [SMALLEST_READ // 4]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with contextlib.suppress(OSError, ValueError):
            caches.append(int(path.read_text(encoding="utf-8").strip().removesuffix("K")) * 1024)
    return -(-min(4 * max(caches), LARGEST_READ) // (4 * WIDTH * WIDTH))


def _session(matrices: int, width: int) -> Callable[[int], Any]:
    """run(rows): a (rows, width) array times each of `matrices` square matrices, on the CPU."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    square = np.random.default_rng(0).random((width, width), dtype=np.float32)
    numbers = range(matrices)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", f"w{i}"], [f"y{i}"]) for i in numbers],
        "probe",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", width])],
        [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, ["rows", width]) for i in numbers],
        [numpy_helper.from_array(square + np.float32(i), f"w{i}") for i in numbers],  # unequal: none is shared
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return lambda rows: session.run(None, {"x": np.ones((rows, width), dtype=np.float32)})


def _best_seconds(run: Callable[[], Any]) -> float:
    """The shortest of some runs: what else runs here can only lengthen one."""
    run()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


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
