"""Fixtures of the tests that run on doubles.

A module asks with `pytest_plugins = ("tests.support.doubles.fixtures",)`.
"""

from __future__ import annotations

import functools
import gc
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edgeprune.engine import probe
from edgeprune.engine.onnx.graph import GraphFiles, write_graphs
from edgeprune.ondevice import probe_tasks, tasks
from edgeprune.ondevice.reference import write_reference
from edgeprune.ondevice.worker import OnProgress, quiet
from tests.support.doubles import double_tensorrt
from tests.support.doubles.double_device import Device, Work
from tests.support.doubles.install import (
    IN_PLACE_VERSION,
    LAYERS,
    MODEL,
    OPSET24,
    PRIMITIVE,
    RUNTIME,
    WORKLOAD,
    built,
    install,
    on_the_processor,
)
from tests.support.reference import decoder_of, weights_of

VARIANTS = (OPSET24, PRIMITIVE, RUNTIME)
IDS = np.random.default_rng(2).integers(0, 200, 100)


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["fp32", "fp16"])
def precision(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, layer: str) -> Iterator[Device]:
    """A double of a GPU behind one of the two modules; at the test's end nothing may be left on it."""
    made = Device()
    install(monkeypatch, made, (layer,))
    yield made
    if made.retained:
        gc.collect()  # an error's traceback may hold what pycuda frees with its last reference
    assert made.faults == []
    assert made.left() == []
    assert made.retained == 0


@pytest.fixture(scope="session")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, GraphFiles]:
    """The variants that are needed, in fp32 and fp16."""
    decoder, weights = decoder_of(MODEL.config), weights_of(MODEL)
    return {
        precision: write_graphs(
            decoder, weights, tmp_path_factory.mktemp(precision), precision, VARIANTS, WORKLOAD.context
        )
        for precision in ("fp32", "fp16")
    }


@pytest.fixture
def plan(device: Device, graphs: dict[str, GraphFiles], tmp_path: Path) -> Path:
    """An fp32 engine of the double."""
    return built(graphs["fp32"].graphs[PRIMITIVE], tmp_path / "model.engine")


@pytest.fixture
def plan_in_place(
    device: Device, layer: str, graphs: dict[str, GraphFiles], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The same of a release, and from a graph, that update the KV cache in place."""
    install(monkeypatch, device, (layer,), IN_PLACE_VERSION)
    return built(graphs["fp32"].graphs[OPSET24], tmp_path / "in_place.engine")


@pytest.fixture
def reference(graphs: dict[str, GraphFiles], tmp_path: Path) -> Path:
    """Of the fp32 graph in ONNX Runtime: 20 tokens of a prompt and 8 after it, more than the engine's sequence."""
    write_reference(on_the_processor(graphs["fp32"], 1), IDS[:28], tmp_path / "reference.npz")
    return tmp_path / "reference.npz"


def execute(context: double_tensorrt.IExecutionContext, handle: int) -> bool:
    """A step of any one-input graph: 100 MB/s of weights or 10 GFLOP/s, whichever binds, and 20 ms."""
    device = context._device
    stream = device.stream_at(int(handle))
    (rows, width), engine = context._shapes["x"], context._engine_life
    context._check_memory(dict.fromkeys(("x", "y"), (rows, width)))
    matrices = device.matrices[width]
    seconds = max(matrices * 2 * width**2 / 100e6, 2 * rows * matrices * width**2 / 10e9) + 0.02
    parts = (dict.fromkeys(("x", "y"), (rows, width)), dict(context._addresses), (engine, context._life))
    step = functools.partial(double_tensorrt._compute, device, context._session, context._tensors, *parts)
    device.put(stream, Work(step, 1e3 * seconds, context._life))
    return True


def ask(module: str, request: dict, timeout_seconds: float, on_progress: OnProgress = quiet) -> dict:
    """A build in this process, where the doubles are."""
    return tasks.answer(json.loads(json.dumps(request)), on_progress)


@pytest.fixture
def gpu(device: Device, monkeypatch: pytest.MonkeyPatch) -> Device:
    """Small stacks; what nvidia-smi and /proc/meminfo would say."""
    monkeypatch.setattr(probe_tasks, "ask", ask)
    monkeypatch.setattr(double_tensorrt.IExecutionContext, "execute_async_v3", execute)
    monkeypatch.setattr(probe, "WIDTH", 256)
    monkeypatch.setattr(probe, "GPU_READ", 8 * 2 * 256**2)
    monkeypatch.setattr(probe, "GPU_ROWS", 512)
    monkeypatch.setattr(probe, "GPU_MATRICES", 8)
    device.matrices = {256: 8, 8: 1}
    left = iter([2**27, 2**27 - 2**25])
    monkeypatch.setattr(probe_tasks, "_free_bytes", lambda shared: next(left))
    return device
