"""The probe's graphs give what they say, build for a GPU without one, and are timed; the GPU is a double here."""

from __future__ import annotations

import functools
import subprocess
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest

from edgeprune.engine import probe
from edgeprune.errors import EngineError
from edgeprune.ondevice import machine, probe_tasks
from edgeprune.ondevice.measure import LocalSession
from edgeprune.ondevice.probe_tasks import Stack, compile_stack, write_weights
from edgeprune.ondevice.tensorrt import available
from edgeprune.precision import PRECISIONS
from tests.support.doubles import double_tensorrt
from tests.support.doubles.double_device import Device, Fault
from tests.support.doubles.probed import probed

pytest_plugins = ("tests.support.doubles.fixtures",)


def written(stack: Stack, folder: Path) -> Path:
    graph = folder / "read.onnx"
    probe.write_graph(stack, graph)
    write_weights(stack, graph)
    return graph


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_stack_is_a_chain_of_unequal_products_of_numbers_that_stay_finite(precision: str, tmp_path: Path) -> None:
    stack = Stack(3, 64, 16, precision)
    graph = written(stack, tmp_path)
    weights = np.fromfile(probe_tasks.weights_file(graph), PRECISIONS[precision].numpy_dtype).reshape(16, 64, 64)
    assert weights.nbytes == stack.weight_bytes
    assert len({weight.tobytes() for weight in weights}) == 16
    values = np.random.default_rng(0).normal(size=(3, 64)).astype(weights.dtype)
    expected = functools.reduce(lambda rows, weight: rows @ weight, weights.astype(np.float64), values)
    assert 0.1 < expected.std() < 10
    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {"x": values})
    np.testing.assert_allclose(result, expected, atol=1e-4 if precision == "fp32" else 0.1)


def test_bf16_weights_are_the_upper_halves_of_fp32_ones() -> None:
    values = np.random.default_rng(0).standard_normal(100).astype(np.float32)
    bits = probe_tasks.in_precision(values, "bf16")
    assert (bits.dtype, bits.nbytes) == (np.uint16, 200)
    held = (bits.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_allclose(held, values, rtol=2**-7)
    assert probe_tasks.in_precision(np.ones(1, np.float32), "bf16")[0] == 0x3F80


def test_bytes_and_operations_of_a_stack() -> None:
    stack = Stack(256, 4096, 4, "fp16")
    assert (stack.weight_bytes, stack.flops) == (2**27, 2 * 256 * 4 * 2**24)
    assert Stack(1, 4096, 4, "fp32").weight_bytes == 2**28


@pytest.mark.skipif(not available("tensorrt-rtx")[0], reason="TensorRT for RTX is not installed")
@pytest.mark.parametrize(
    ("role", "precision"), [("call", "fp16"), ("read", "fp16"), ("product", "fp16"), ("product", "bf16")]
)
def test_the_graphs_build_for_a_gpu_without_one(
    role: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every weight once: a stack that were folded or stored twice would tell a wrong bandwidth."""
    monkeypatch.setattr(probe, "WIDTH", 512)
    stack = probe._stacks(precision, probe.GPU_ROWS, probe.GPU_MATRICES, 16)[role]
    weights = compile_stack(written(stack, tmp_path), tmp_path / "plan", stack, "tensorrt-rtx", 86)
    assert stack.weight_bytes <= weights <= stack.weight_bytes + 4096
    assert (tmp_path / "plan").stat().st_size > weights


@pytest.mark.skipif(not available("tensorrt-rtx")[0], reason="TensorRT for RTX is not installed")
def test_a_graph_that_cannot_be_built_is_an_engine_error(tmp_path: Path) -> None:
    (tmp_path / "read.onnx").write_bytes(b"no graph")
    with pytest.raises(EngineError, match="cannot build a product"):
        compile_stack(tmp_path / "read.onnx", tmp_path / "plan", Stack(1, 8, 1, "fp16"), "tensorrt-rtx", 86)
    assert not (tmp_path / "plan").exists()


def test_the_processor_is_timed_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "WIDTH", 256)
    told = []
    answer = probe._time(LocalSession(), "onnxruntime", probe._stacks("fp32", 16, 1, 4), lambda *s: told.append(s))
    assert set(answer["took"]) == {"call", "read", "product"}
    assert all(0 < took.seconds < 1 and took.spread >= 0 for took in answer["took"].values())
    assert {stage for stage, _, _ in told} == {"make weights to probe with", "time the processor"}


def test_the_best_run_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = iter(np.cumsum([0, 0.4, 0, 0.3, 0, 0.1, 0, 0.2, 0, 0.6]).tolist())
    monkeypatch.setattr(probe_tasks, "time", SimpleNamespace(perf_counter=lambda: next(ends)))
    took = probe_tasks.best(lambda: None)
    assert (took.seconds, took.spread) == (pytest.approx(0.1), pytest.approx(2))


def test_a_device_without_room_is_told_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, stacks = {"read": tmp_path / "read.onnx"}, {"read": Stack(1, 4096, 8, "fp16")}
    with monkeypatch.context() as full, pytest.raises(EngineError, match="probing writes 768 MiB, 5 MiB are free"):
        usage = namedtuple("usage", "total used free")
        full.setattr(probe_tasks.shutil, "disk_usage", lambda folder: usage(0, 0, 5 * 2**20))
        probe_tasks._check_room(paths, stacks, copies=3)
    with monkeypatch.context() as busy, pytest.raises(EngineError, match="needs 1024 MiB of memory, 900 MiB are"):
        busy.setattr(machine, "memory_state", lambda: {"available": 900 * 2**20})
        probe_tasks._check_room(paths, stacks, copies=3)
    probe_tasks._check_room(paths, stacks, copies=1)


@pytest.mark.parametrize(("said", "free"), [("7000\n24000\n", 7000 * 2**20), ("[N/A]\n", None), ("", None)])
def test_free_memory_is_the_drivers_word(said: str, free: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 0, said, ""))
    assert probe_tasks._free_bytes(shared=False) == free
    monkeypatch.setattr(machine, "memory_state", lambda: {"available": 5, "swapped": 0})
    assert probe_tasks._free_bytes(shared=True) == 5


# The GPU, a double of it. Nothing below ran on one.


def test_on_a_double_nothing_is_left_of_a_step_that_is_refused(gpu: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(double_tensorrt.IExecutionContext, "execute_async_v3", lambda context, stream: False)
    with pytest.raises(EngineError, match="refuses a step of the probe"):
        probed()


def test_on_a_double_a_gpu_that_fails_is_an_error(gpu: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise Fault("CUDA_ERROR_ILLEGAL_ADDRESS", "a bad kernel")

    monkeypatch.setattr(double_tensorrt, "_compute", fail)
    with pytest.raises(EngineError, match="the GPU failed"):
        probed()
    gpu.faults.clear()  # every call fails after such an error: the memory goes with the process


def test_on_a_double_without_memory_the_engine_is_not_opened(gpu: Device) -> None:
    gpu.memory = 2**20 + 2**16  # one context, and not the weights that are read
    with pytest.raises(EngineError, match="cannot be opened: .*out of memory"):
        probed()


def test_a_system_that_hides_its_memory_is_an_engine_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(probe_tasks.os, "sysconf")
    with pytest.raises(EngineError, match="total memory"):
        probe_tasks.total_memory()
