"""Hardware figures of this machine's processor, measured on first use and cached for it.

What estimates need is what ONNX Runtime reaches: the bandwidth of a matrix-vector product over
weights that fit in no cache (decode), and the rate of a matrix product (prefill).
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.cache import cache_folder
from edgeprune.profiles import DeviceProfile, Rated

WIDTH = 4096  # weights of 4096 x 16384 fp32 are 256 MiB
ROWS = 256
REPEATS = 5


def processor() -> str:
    """The processor's model name, and how many threads it runs at once."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith(("model name", "hardware")):
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} threads"


def probed(profile: DeviceProfile) -> DeviceProfile:
    """The profile with this machine's figures: from the cache, else measured now."""
    import onnxruntime

    path = cache_folder() / "probe.json"
    key = f"{processor()}, onnxruntime {onnxruntime.__version__}"
    known: dict[str, Any] = {}
    if path.is_file():
        try:
            known = json.loads(path.read_text())
        except ValueError:
            known = {}  # a cache that cannot be read is made again
    if key not in known:
        known[key] = _measure(f"probed with onnxruntime {onnxruntime.__version__} on {processor()}")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"probe.json.{os.getpid()}")
        temporary.write_text(json.dumps(known, indent=2))
        temporary.replace(path)
    return profile.model_copy(update={name: Rated(**figure) for name, figure in known[key].items()})


def _measure(source: str) -> dict[str, dict[str, Any]]:
    def rated(value: float, unit: str, note: str = "", confidence: str = "medium") -> dict[str, Any]:
        return {"value": value, "unit": unit, "source": note or source, "confidence": confidence}

    run = _matrix_product()
    vector = np.zeros((1, WIDTH), dtype=np.float32)
    matrix = np.zeros((ROWS, WIDTH), dtype=np.float32)
    weights = 4 * WIDTH * 4 * WIDTH
    return {
        "memory": rated(_total_memory(), "B", "the operating system", "high"),
        "system_reserve": rated(0.0, "B", "shared with whatever else runs here", "low"),
        "runtime_memory": rated(_runtime_bytes(), "B"),
        "bandwidth": rated(weights / _best_seconds(lambda: run(vector)) / 1e9, "GB/s"),
        "fp32_compute": rated(2 * ROWS * weights / 4 / _best_seconds(lambda: run(matrix)) / 1e9, "GFLOP/s"),
        "decode_efficiency": rated(1.0, "1", "the bandwidth is that of a matrix-vector product"),
        "decode_overhead": rated(0.0, "ms", "not probed: the measurements of the run correct it", "low"),
        "prefill_efficiency": rated(1.0, "1", "the rate is that of a matrix product"),
    }


def _matrix_product() -> Callable[[np.ndarray], Any]:
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    rows = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", WIDTH])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 4 * WIDTH])
    weights = np.random.default_rng(0).random((WIDTH, 4 * WIDTH), dtype=np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], "probe", [rows], [out], [numpy_helper.from_array(weights, "w")]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"x": x})


def _best_seconds(run: Callable[[], Any]) -> float:
    run()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def _runtime_bytes() -> float:
    """Resident bytes of a fresh process that has loaded the runtime and nothing else."""
    import subprocess
    import sys

    code = (
        "import resource, sys, onnxruntime;"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return float(result.stdout)


def _total_memory() -> float:
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
