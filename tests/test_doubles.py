"""The doubles' own rules: each misuse is an error there, and no name is one that the real modules do not have."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from edgeprune.engine.onnx.graph import GraphFiles
from tests.support import DATA
from tests.support.doubles import double_cuda_python, double_pycuda, double_tensorrt, double_tensorrt_base
from tests.support.doubles import double_tensorrt_builder as building
from tests.support.doubles.double_device import Device, Fault, Work
from tests.support.doubles.install import IN_PLACE_VERSION, OPSET24, PRIMITIVE, VERSION, WORKLOAD, built, install

pytest_plugins = ("tests.support.doubles.fixtures",)

# Bytes come with a buffer, and the members of an enum with int.
PLAIN = {name for kind in (bytes, int) for name in dir(kind)}


def recorded(pattern: str) -> dict[str, dict[str, set[str]]]:
    """Every recorded list: class -> names."""
    return {
        path.stem: {kind: set(names) for kind, names in json.loads(path.read_text())["names"].items()}
        for path in sorted(DATA.glob(pattern))
    }


def public(kind: object) -> set[str]:
    return {name for name in dir(kind) if not name.startswith("_")} - PLAIN


def test_the_tensorrt_double_has_no_name_that_a_recorded_release_misses() -> None:
    made = double_tensorrt.module(Device(), VERSION)
    kinds = {
        name: kind
        for module in (double_tensorrt, building, double_tensorrt_base)
        for name, kind in vars(module).items()
        if isinstance(kind, type)
        and kind.__module__.startswith("tests.support.doubles.double_tensorrt")
        and name not in ("Strict", "Refused", "ICudaEngineInPlace")
    }
    assert len(kinds) > 15
    releases = recorded("tensorrt_names/*.json")
    assert len(releases) == 7
    for release, names in releases.items():
        assert public(made) - {"device"} <= names[""], release
        for name, kind in kinds.items():
            assert public(kind) <= names[name], (release, name)
        assert public(double_tensorrt_base.ILogger.Severity) <= names["ILogger.Severity"]
        # The class of an engine is that of the release.
        in_place = building.updates_in_place(release.partition("-")[2]) or release.startswith("tensorrt_rtx")
        assert (public(double_tensorrt.ICudaEngineInPlace) <= names["ICudaEngine"]) == in_place, release


def test_the_cuda_doubles_have_no_name_that_a_recorded_release_misses() -> None:
    _, driver = double_pycuda.module(Device())
    for release, names in recorded("cuda_names/pycuda-*.json").items():
        assert public(driver) <= names[""], release
        for name in ("Context", "Device", "DeviceAllocation", "Event", "Stream"):
            assert public(getattr(driver, name)) <= names[name], (release, name)
    for release, names in recorded("cuda_names/cuda-bindings-*.json").items():
        unlisted = {"CUdevice_attribute"}  # the lists hold few enums; this one is of every release
        assert public(double_cuda_python.module(Device())) - unlisted <= names[""], release
        for kind in (double_cuda_python.CUresult, double_cuda_python.CUstreamCaptureMode):
            assert public(kind) <= names[kind.__name__], release


@pytest.fixture
def current() -> Device:
    """A device with a context."""
    device = Device()
    device.retain()
    device.pushed = 1
    return device


def test_memory_that_is_freed_unknown_or_too_small(current: Device) -> None:
    address = current.allocate(8, "test")
    for call in (
        lambda: current.write(address, bytes(9)),
        lambda: current.read(address, 9),
        lambda: current.read(address + 4, 1),
        lambda: current.free(address + 4),
        lambda: current.allocate(0, "test"),
    ):
        with pytest.raises(Fault, match="INVALID_VALUE"):
            call()
    with pytest.raises(Fault, match="OUT_OF_MEMORY"):
        current.allocate(current.memory, "test")
    assert current.read(address, 8) == b"\xff" * 8  # what is new holds no zeros
    current.free(address)
    for call in (lambda: current.read(address, 1), lambda: current.free(address)):
        with pytest.raises(Fault, match="not allocated"):
            call()


def test_nothing_works_without_a_context(current: Device) -> None:
    address, stream = current.allocate(8, "test"), current.stream(True)
    current.release()
    assert sorted(current.faults) == [
        "a stream is left when the context ends",
        "memory of test is left when the context ends",
    ]
    for call in (
        lambda: current.read(address, 1),
        lambda: current.stream(True),
        lambda: current.stream_at(stream.handle),
    ):
        with pytest.raises(Fault, match="INVALID_CONTEXT"):
            call()
    with pytest.raises(Fault, match="not retained"):
        current.release()


def test_work_waits_until_somebody_waits_for_it(current: Device) -> None:
    """The default stream waits for blocking streams alone, and where there is one per thread for none."""
    for blocking, per_thread, waits in ((True, False, True), (False, False, False), (True, True, False)):
        current.per_thread = per_thread
        address, stream = current.allocate(1, "test"), current.stream(blocking)
        current.put(stream, Work(lambda address=address: current.allocations[address].data.fill(1), 5))
        assert current.read(address, 1) == (b"\1" if waits else b"\xff")
        current.synchronize(stream.handle)
        assert current.read(address, 1) == b"\1"
    assert current.clock_ms == 15


def test_streams_and_events_end(current: Device) -> None:
    stream, begin, end = current.stream(True), current.event(), current.event()
    with pytest.raises(Fault, match="not recorded"):
        current.elapsed_ms(begin, end)
    current.record(begin, stream.handle)
    current.record(end, stream.handle)
    with pytest.raises(Fault, match="NOT_READY"):
        current.elapsed_ms(begin, end)
    current.synchronize(stream.handle)
    assert current.elapsed_ms(begin, end) == 0
    current.destroy(end)
    for call in (lambda: current.elapsed_ms(begin, end), lambda: current.destroy(end), lambda: current.record(end, 0)):
        with pytest.raises(Fault, match="INVALID_HANDLE"):
            call()
    current.destroy_stream(stream.handle)
    for call in (current.synchronize, current.destroy_stream, lambda handle: current.record(begin, handle)):
        with pytest.raises(Fault, match="is no stream"):
            call(stream.handle)


def test_a_capture_is_broken_by_what_waits(current: Device) -> None:
    address, stream = current.allocate(1, "test"), current.stream(True)
    for misuse in (lambda: current.synchronize(stream.handle), lambda: current.read(address, 1)):
        current.begin_capture(stream.handle)
        with pytest.raises(Fault, match="STREAM_CAPTURE"):
            misuse()
        with pytest.raises(Fault, match="INVALIDATED"):
            current.end_capture(stream.handle)
    with pytest.raises(Fault, match="not captured"):
        current.end_capture(stream.handle)
    current.begin_capture(stream.handle)
    executable = current.instantiate(current.end_capture(stream.handle))
    current.destroy(executable)
    with pytest.raises(Fault, match="no such graph"):
        current.replay(executable, stream.handle)


class Engine(SimpleNamespace):
    """A context of the double with all that a step of one sequence needs; `log` is what it said."""


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, graphs: dict[str, GraphFiles], tmp_path: Path) -> Engine:
    device = Device()
    device.retain()
    device.pushed = 1
    install(monkeypatch, device, ())
    trt, log = sys.modules["tensorrt"], []

    class Logger(trt.ILogger):
        def log(self, severity: object, msg: str) -> None:
            log.append(msg)

    runtime = trt.Runtime(Logger())
    loaded = runtime.deserialize_cuda_engine(built(graphs["fp32"].graphs[PRIMITIVE], tmp_path / "plan").read_bytes())
    context, stream = loaded.create_execution_context(), device.stream(True)
    names = [loaded.get_tensor_name(index) for index in range(loaded.num_io_tensors)]
    shapes = {name: (1, 2) if not name.startswith("past") else (1, 2, 0, 16) for name in names[:3] + names[3:9]}
    address = {name: device.allocate(2**14, "test") for name in names}
    for name in names:
        assert context.set_tensor_address(name, address[name])
        if name in shapes:
            assert context.set_input_shape(name, shapes[name])
    for name in names[:3]:
        device.write(address[name], np.arange(2, dtype=np.int64).tobytes())
    return Engine(
        device=device,
        log=log,
        runtime=runtime,
        loaded=loaded,
        context=context,
        stream=stream.handle,
        address=address,
        shapes=shapes,
        trt=trt,
    )


def test_a_step_that_is_right(engine: Engine) -> None:
    assert engine.context.execute_async_v3(engine.stream)
    assert np.frombuffer(engine.device.allocations[engine.address["logits"]].data[:4], np.uint32)[0] == 2**32 - 1
    engine.device.synchronize(engine.stream)
    assert np.isfinite(np.frombuffer(engine.device.read(engine.address["logits"], 800), np.float32)).all()


REFUSED: dict[str, Callable[[Engine], object]] = {
    r"the shape of input_ids is not set": lambda e: e.context._shapes.pop("input_ids"),
    r"the address of logits is not set": lambda e: e.context._addresses.pop("logits"),
    r"are the same memory": lambda e: e.context.set_tensor_address("present.0.key", e.address["past_key_values.0.key"]),
    r"is not allocated": lambda e: e.device.free(e.address["logits"]),
    r"8 bytes.*not allocated|is not allocated": lambda e: e.context.set_tensor_address("logits", 4096),
    r"800 bytes at .* which has 799": lambda e: e.context.set_tensor_address("logits", e.device.allocate(799, "test")),
    r"batch is 2 in attention_mask and 1|batch is": lambda e: e.context.set_input_shape("attention_mask", (2, 2)),
    r"0 and 2 tokens with a mask of 3": lambda e: e.context.set_input_shape("attention_mask", (1, 3)),
    r"is no stream": lambda e: e.device.destroy_stream(e.stream),
    r"not permitted when stream is capturing": lambda e: e.device.begin_capture(e.stream),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_step_that_is_refused(message: str, engine: Engine) -> None:
    REFUSED[message](engine)
    assert engine.context.execute_async_v3(engine.stream) is False
    assert len(engine.log) == 1
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(engine.log[0])


def test_a_cache_in_place_must_be_one_memory_within_its_bounds(
    graphs: dict[str, GraphFiles], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The real runtime refuses an output at another address than its input; a write beyond the cache it may not see."""
    device = Device()
    device.retain()
    device.pushed = 1
    install(monkeypatch, device, (), IN_PLACE_VERSION)
    trt, log = sys.modules["tensorrt"], []

    class Logger(trt.ILogger):
        def log(self, severity: object, msg: str) -> None:
            log.append(msg)

    runtime = trt.Runtime(Logger())
    loaded = runtime.deserialize_cuda_engine(built(graphs["fp32"].graphs[OPSET24], tmp_path / "plan").read_bytes())
    assert loaded.get_aliased_input_tensor("present.2.value") == "past_key_values.2.value"
    assert loaded.get_aliased_input_tensor("logits") is None
    context, stream = loaded.create_execution_context(), device.stream(True).handle
    shapes = {"input_ids": (1, 2), "position_ids": (1, 2), "attention_mask": (1, 48), "write_indices": (1,)}
    names = [loaded.get_tensor_name(index) for index in range(loaded.num_io_tensors)]
    address = {name: device.allocate(2**14, "test") for name in names}
    shapes |= {name: (1, 2, 48, 16) for name in names if name.startswith("past")}
    assert context.set_input_shape("past_key_values.0.key", (1, 2, 47, 16)) is False  # the capacity is the engine's
    for name in names:
        assert context.set_tensor_address(name, address[name.replace("present", "past_key_values")])
        if name in shapes:
            assert context.set_input_shape(name, shapes[name])
    assert context.set_tensor_address("present.1.key", address["present.1.key"])
    assert context.execute_async_v3(stream) is False
    assert "present.1.key must share the memory of past_key_values.1.key" in log[-1]
    context.set_tensor_address("present.1.key", address["past_key_values.2.key"])
    assert context.execute_async_v3(stream) is False
    context.set_tensor_address("present.1.key", address["past_key_values.1.key"])
    for begin, fits in ((46, True), (47, False)):
        for name, value in (("input_ids", [1, 2]), ("position_ids", [0, 1]), ("attention_mask", [1] * 48)):
            device.write(address[name], np.array(value, np.int64).tobytes())
        device.write(address["write_indices"], np.array([begin], np.int64).tobytes())
        assert context.execute_async_v3(stream)
        if fits:
            device.synchronize(stream)
            continue
        with pytest.raises(Fault, match="a write beyond the KV cache"):
            device.synchronize(stream)


def test_shapes_and_names_that_are_refused(engine: Engine) -> None:
    context = engine.context
    for name, shape in (
        ("input_ids", (1, 9)),
        ("input_ids", (3, 1)),
        ("input_ids", (1,)),
        ("nobody", (1, 1)),
        ("logits", (1, 1, 200)),
        ("past_key_values.0.key", (1, 2, WORKLOAD.context, 16)),
        ("past_key_values.0.key", (1, 3, 0, 16)),
    ):
        assert context.set_input_shape(name, shape) is False
    assert context.set_tensor_address("nobody", 4096) is False
    assert len(engine.log) == 8
    with pytest.raises(TypeError):
        context.set_input_shape("input_ids", (1, 2.0))
    with pytest.raises(AttributeError):
        context.no_such_name = 1


def test_what_a_step_reads_is_what_was_copied_there(engine: Engine) -> None:
    """int32 ids are half of what an int64 engine reads: the rest is what was there before."""
    engine.device.write(engine.address["input_ids"], np.arange(2, dtype=np.int32).tobytes())
    assert engine.context.execute_async_v3(engine.stream)
    with pytest.raises(Fault, match="input_ids reads 16 bytes where the last copy wrote 8"):
        engine.device.synchronize(engine.stream)
    with pytest.raises(Fault, match="an earlier kernel failed"):
        engine.device.read(engine.address["logits"], 4)


def test_memory_that_is_freed_under_a_step(engine: Engine) -> None:
    assert engine.context.execute_async_v3(engine.stream)
    engine.device.free(engine.address["input_ids"])
    assert engine.device.faults == ["memory is freed while a stream still works"]
    with pytest.raises(Fault, match="ILLEGAL_ADDRESS"):
        engine.device.synchronize(engine.stream)


def test_things_that_end_in_the_wrong_order(engine: Engine) -> None:
    device = engine.device
    engine.context.execute_async_v3(engine.stream)
    engine.loaded = None
    assert device.faults == ["the engine ends before its context"]
    with pytest.raises(Fault, match="the engine of this context is gone"):
        engine.context.execute_async_v3(engine.stream)
    engine.context = None
    assert device.faults[1:] == ["the context ends before its work"]
    with pytest.raises(Fault, match="gone"):
        device.synchronize(engine.stream)


def test_what_outlives_its_runtime_or_cuda_s_context(engine: Engine) -> None:
    engine.runtime = engine.context = None
    engine.device.release()
    engine.device.faults.clear()
    engine.loaded = None
    assert engine.device.faults == [
        "the runtime ends before its engine",
        "an engine or a context outlives CUDA's context",
    ]


def test_the_builder_refuses_what_the_real_one_does(engine: Engine, graphs: dict[str, GraphFiles]) -> None:
    trt, log = engine.trt, []

    class Logger(trt.ILogger):
        def __init__(self, initialised: bool = True) -> None:
            if initialised:
                trt.ILogger.__init__(self)

        def log(self, severity: object, msg: str) -> None:
            log.append(msg)

    with pytest.raises(TypeError, match="ILogger.__init__"):
        trt.Builder(Logger(initialised=False))
    builder = trt.Builder(Logger())
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, Logger())
    assert parser.parse_from_file(str(graphs["fp32"].graphs[PRIMITIVE]))
    assert builder.build_serialized_network(network, builder.create_builder_config()) is None
    assert "not strongly typed" in log[-1]
    network = builder.create_network(1 << trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    assert trt.OnnxParser(network, Logger()).parse_from_file(str(graphs["fp32"].graphs[PRIMITIVE]))
    assert builder.build_serialized_network(network, builder.create_builder_config()) is None
    assert "a shape for every input" in log[-1]
    with pytest.raises(ValueError, match="input_ids"):
        builder.create_optimization_profile().set_shape("input_ids", (1, 2), (1, 1), (1, 2))
