"""Puts the doubles where the code looks for the real modules, and builds engines for them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgeprune.engine.answers import read_answer
from edgeprune.engine.onnx.graph import GraphFiles, GraphVariant
from edgeprune.ondevice import cuda, tasks
from edgeprune.ondevice.figures import Workload
from edgeprune.ondevice.onnxruntime import GraphRunner
from edgeprune.ondevice.tensorrt import compile_plan
from edgeprune.ondevice.worker import OnProgress
from tests.support.doubles import double_cuda_python, double_pycuda, double_tensorrt
from tests.support.doubles.double_device import Device
from tests.support.graph_models import llama

LAYERS = ("pycuda", "cuda-python")
CUDA_MODULES = ("pycuda", "pycuda.driver", "cuda", "cuda.cuda", "cuda.bindings", "cuda.bindings.driver")
VERSION = "10.13.3.9"
IN_PLACE_VERSION = "10.16.1.11"  # of a release that updates the KV cache in place
WORKLOAD = Workload(batch=2, prompt=8, context=48)
MODEL = llama(True)
PRIMITIVE, RUNTIME = GraphVariant("primitive", "last"), GraphVariant("onnxruntime", "last")
OPSET24 = GraphVariant("opset24", "last")


def install(patch: pytest.MonkeyPatch, device: Device, layers: tuple[str, ...], version: str = VERSION) -> None:
    """`tensorrt` of a release, the CUDA modules that are named, the others missing; the device's own clocks."""
    for name in CUDA_MODULES:
        patch.setitem(sys.modules, name, None)
    if "pycuda" in layers:
        package, driver = double_pycuda.module(device)
        patch.setitem(sys.modules, "pycuda", package)
        patch.setitem(sys.modules, "pycuda.driver", driver)
    if "cuda-python" in layers:
        patch.setitem(sys.modules, "cuda.bindings.driver", double_cuda_python.module(device))
    patch.setitem(sys.modules, "tensorrt", double_tensorrt.module(device, version))
    patch.setattr(cuda, "time", SimpleNamespace(perf_counter=lambda: device.host_ms / 1e3))


def built(graph: Path, plan: Path, workload: Workload = WORKLOAD) -> Path:
    compile_plan(graph, plan, workload, None, "tensorrt")
    return plan


def on_the_processor(files: GraphFiles, batch: int) -> GraphRunner:
    """ONNX Runtime on another variant of the same weights: what an engine is compared with."""
    return GraphRunner(files.graphs[RUNTIME], batch, WORKLOAD.context, threads=1)


class InProcess:
    """A session whose tasks run in this process, where the doubles are; its answers are JSON, as a child's."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def run(self, request: dict[str, Any], timeout_seconds: float, on_progress: OnProgress) -> dict[str, Any]:
        self.done.append(request["do"])
        answer = tasks.answer(json.loads(json.dumps(request)), on_progress)
        assert "remedy" not in answer  # a child's error has one
        return read_answer(request, json.loads(json.dumps(answer, allow_nan=False)), "a double")
