"""A double of a device that a bundle's rungs are finished on: it answers every task with figures that were given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgeprune.engine.answers import read_answer


class Double:
    """A device: figures by rung, or the error that a rung ends in. memory in bytes beyond what is counted."""

    def __init__(self, rungs: dict[int, dict[str, Any] | Exception], gpu: bool = False) -> None:
        self.rungs, self.gpu, self.asked = rungs, gpu, []

    def run(self, request: dict[str, Any], timeout_seconds: float, on_progress: Callable[..., None]) -> dict[str, Any]:
        return read_answer(request, self._answer(request), "a double")

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        do = request["do"]
        if do == "describe":
            return self._facts()
        paths = [Path(path) for path in request["files"].values()]
        assert all(path.exists() for path in paths)
        rung = int(paths[0].parts[paths[0].parts.index("rungs") + 1])
        self.asked.append((rung, do))
        found = self.rungs[rung]
        if isinstance(found, Exception):
            raise found
        match do:
            case "build":
                Path(request["outputs"]["plan"]).write_bytes(f"engine {rung}".encode())
                return {
                    "version": "10.3",
                    "weights_bytes": 1000,
                    "activation_bytes": 1,
                    "scratch_bytes": 1,
                    "seconds": 1.0,
                    "peak_build_bytes": 5,
                    "warnings": ["slow kernels"],
                }
            case "check":
                return {"cosine": 1.0, "error": 0.0, "equal": 1.0, "positions": 9}
            case "memory":
                return {"baseline": 100, "peak": found["peak"]}
        times = {
            kind: {
                "candidate": {
                    "median": found.get(kind, {"value": 2.0, "low": 1.9, "high": 2.1}),
                    "percentiles": {"p50": 2.0, "p90": 2.1, "p99": 2.2, "mad": 0.1},
                }
            }
            for kind in ("prefill", "decode")
        }
        latencies = {**times, "device": "a board", "conditions": {"power mode": "MAXN"}}
        if not self.gpu:
            return latencies
        memory = {"activations": found["peak"], "cache": 10, "buffers": 1, "used": None}
        return {**latencies, "memory": memory, "notes": [], "gpu": GPU}

    def _facts(self) -> dict[str, Any]:
        modules = {
            "numpy": "1.26",
            "onnxruntime": "1.20",
            "tensorrt": "10.3" if self.gpu else None,
            "tensorrt_rtx": None,
            "xllamacpp": None,
        }
        return {
            "machine": "a board",
            "processor": "ARMv8, 12 threads",
            "python": "3.10.12",
            "memory": {},
            "platform": "linux",
            "modules": modules,
            "gpu": GPU if self.gpu else None,
            "missing": {name: "ModuleNotFoundError: no" for name, found in modules.items() if not found},
            "no_gpu": "no CUDA module works here",
        }


GPU = {"name": "Orin", "sm": 87, "memory": 2**36, "driver": 12060, "layer": "pycuda"}
LARGE, SMALL = {"peak": 10**9}, {"peak": 10**8}
