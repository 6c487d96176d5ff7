"""A double of TensorRT's Python module: engines that run their own graph in ONNX Runtime. Nothing here is TensorRT.

An engine's bytes hold the graph with its weights, the profile, the release and the SM.
The rules of the real runtime hold: a step is refused, with a message, for a shape that is not set or outside
of the profile, for memory that is not there, too small or used twice, and on a stream that is gone. A KV cache that is
updated in place must be one memory for the input and the output that share it, and what is written must fit there.
"""

from __future__ import annotations

import functools
import json
import weakref
from math import prod
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime

from tests.support.doubles import double_tensorrt_builder as building
from tests.support.doubles.double_bf16 import narrowed, widened
from tests.support.doubles.double_device import Allocation, Device, Fault, Life, Work
from tests.support.doubles.double_tensorrt_base import (
    DataType,
    Dims,
    ILogger,
    IProgressMonitor,
    MemoryPoolType,
    NetworkDefinitionCreationFlag,
    Strict,
)

CONTEXT_BYTES = 2**20
NUMPY = {
    DataType.FLOAT: np.float32,
    DataType.HALF: np.float16,
    DataType.INT8: np.int8,
    DataType.INT64: np.int64,
    DataType.BF16: np.uint16,
}


class Refused(Exception):
    """Why a step cannot be put on a stream."""


class Runtime(Strict):
    def __init__(self, module: ModuleType, logger: ILogger) -> None:
        self._module, self._logger = module, building.checked(logger)

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        """None with a message in the log, as the real one, for whatever does not fit this release and GPU."""
        device, version = self._module.device, self._module.__version__
        if device.count == 0:
            return self._fail("CUDA initialization failure with error: 100")
        head, _, rest = bytes(serialized_engine).partition(b"\n")
        if head != building.MAGIC:
            return self._fail("Serialization assertion magicTagRead == kMAGIC_TAG failed. Magic tag does not match")
        plan, _, model = rest.partition(b"\n")
        plan = json.loads(plan)
        if plan["version"] != version:
            return self._fail(
                "Serialization assertion stdVersionRead == kSERIALIZATION_VERSION failed. Version tag does not match. "
                f"Note: Current Version: {version}, Serialized Engine Version: {plan['version']}"
            )
        if plan["sm"] != device.sm:
            return self._fail(
                "The engine plan file is generated on an incompatible device, expecting compute "
                f"{device.sm / 10} got compute {plan['sm'] / 10}, please rebuild."
            )
        try:
            address = device.allocate(plan["weights"], "TensorRT")
        except Fault as fault:
            return self._fail(f"[defaultAllocator.cpp::allocate::31] Cuda Runtime ({fault.why})")
        kind = ICudaEngineInPlace if building.updates_in_place(version) else ICudaEngine
        return kind(self, plan, model, address)

    def _fail(self, text: str) -> None:
        self._logger.log(ILogger.Severity.ERROR, f"IRuntime::deserializeCudaEngine: {text}")


class ICudaEngine(Strict):
    """Holds its weights' memory until nothing refers to it; its contexts must be gone then."""

    def __init__(self, runtime: Runtime, plan: dict[str, Any], model: bytes, weights: int) -> None:
        self._runtime = weakref.ref(runtime)
        self._device, self._logger, self._module = runtime._module.device, runtime._logger, runtime._module
        self._plan, self._weights, self._life = plan, weights, Life()
        self._contexts: weakref.WeakSet[IExecutionContext] = weakref.WeakSet()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        options.add_session_config_entry("session.disable_quant_qdq", "1")  # weights alone are of few bits there
        self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def __del__(self) -> None:
        self._life.alive = False
        if self._contexts:
            self._device.faults.append("the engine ends before its context")
        if self._runtime() is None:
            self._device.faults.append("the runtime ends before its engine")
        _give_back(self._device, self._weights)

    @property
    def num_io_tensors(self) -> int:
        return len(self._plan["tensors"])

    @property
    def device_memory_size_v2(self) -> int:
        return CONTEXT_BYTES + self._plan["copies"]

    def get_tensor_name(self, index: int) -> str:
        return list(self._plan["tensors"])[index]

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType[self._plan["tensors"][name]["dtype"]]

    def get_tensor_shape(self, name: str) -> Dims:
        return Dims([-1 if isinstance(size, str) else size for size in self._plan["tensors"][name]["shape"]])

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Dims]:
        if profile_index != 0:
            raise ValueError(f"there is no profile {profile_index}")
        return [Dims(shape) for shape in self._plan["profile"][name]]

    def create_execution_context(self) -> IExecutionContext | None:
        try:
            address = self._device.allocate(self.device_memory_size_v2, "TensorRT")
        except Fault as fault:
            self._logger.log(ILogger.Severity.ERROR, f"ICudaEngine::createExecutionContext: {fault.why}")
            return None
        context = IExecutionContext(self, address)
        self._contexts.add(context)
        return context


class ICudaEngineInPlace(ICudaEngine):
    """The class of releases that update a KV cache in place; there it has the same name."""

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return self._plan["aliases"].get(name)


class IExecutionContext(Strict):
    def __init__(self, engine: ICudaEngine, memory: int) -> None:
        self._tensors, self._profile = engine._plan["tensors"], engine._plan["profile"]
        self._aliases = engine._plan["aliases"]
        self._device, self._logger, self._session = engine._device, engine._logger, engine._session
        self._engine_life, self._life, self._memory = engine._life, Life(), memory
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._ran: dict[str, tuple[int, ...]] = {}  # shapes of the last step outside of a capture

    def __del__(self) -> None:
        self._life.alive = False
        waiting = [work for stream in self._device.streams.values() for work in stream.queue]
        if any(work.user is self._life for work in waiting):
            self._device.faults.append("the context ends before its work")
        _give_back(self._device, self._memory)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if name not in self._profile:
            return self._fail("setInputShape", f"{name} is no input")
        if not isinstance(shape, tuple | list | Dims) or not all(isinstance(size, int) for size in shape):
            raise TypeError("set_input_shape(): incompatible function arguments")
        low, _, high = self._profile[name]
        if len(shape) != len(low) or not all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True)):
            return self._fail("setInputShape", f"{name}: {tuple(shape)} is outside of {tuple(low)} to {tuple(high)}")
        self._shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self._tensors:
            return self._fail("setTensorAddress", f"{name} is no input or output")
        if int(memory) % 256:
            return self._fail("setTensorAddress", f"{name} at {int(memory):#x} is not aligned to 256 bytes")
        self._addresses[name] = int(memory)
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        """Checks, and leaves the step to the stream with the addresses and shapes of now."""
        if not self._engine_life.alive:
            raise Fault("CUDA_ERROR_ILLEGAL_ADDRESS", "the engine of this context is gone")
        try:
            stream = self._device.stream_at(int(stream_handle))
            shapes = self._all_shapes()
            self._check_memory(shapes)
            if stream.captured is not None and (not self._device.capturable or self._ran != shapes):
                stream.broken = "a step that cannot be captured"
                raise Refused("operation not permitted when stream is capturing")
        except (Refused, Fault) as why:
            return self._fail("enqueueV3", str(why))
        self._device.host_ms += self._device.launch_ms
        self._device.launches.append("step")
        if stream.captured is None:
            self._ran = shapes
        tokens, total = shapes["input_ids"][1], shapes["attention_mask"][1]
        addresses = {name: self._addresses[name] for name in shapes}
        self._device.bound.append(addresses)
        step = functools.partial(
            _compute, self._device, self._session, self._tensors, shapes, addresses, (self._engine_life, self._life)
        )
        self._device.put(stream, Work(step, self._device.step_ms(tokens, total - tokens), self._life))
        return True

    def _fail(self, call: str, text: str) -> bool:
        self._logger.log(ILogger.Severity.ERROR, f"IExecutionContext::{call}: Error Code 3: API Usage Error ({text})")
        return False

    def _all_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of inputs and outputs, by the names of their dimensions: equal names must be equal sizes."""
        sizes: dict[str, int] = {}
        for name in self._profile:
            if name not in self._shapes:
                raise Refused(f"the shape of {name} is not set")
            for label, size in zip(self._tensors[name]["shape"], self._shapes[name], strict=True):
                if isinstance(label, str) and sizes.setdefault(label, size) != size:
                    raise Refused(f"{label} is {size} in {name} and {sizes[label]} elsewhere")
        if "past" in sizes and sizes["past"] + sizes["sequence"] != sizes["total"]:
            raise Refused(f"{sizes['past']} and {sizes['sequence']} tokens with a mask of {sizes['total']}")
        return {name: tuple(sizes.get(label, label) for label in one["shape"]) for name, one in self._tensors.items()}

    def _check_memory(self, shapes: dict[str, tuple[int, ...]]) -> None:
        regions: dict[int, str] = {}
        for name, shape in shapes.items():
            if name not in self._addresses:
                raise Refused(f"the address of {name} is not set")
            address = self._addresses[name]
            self._device.memory_at(address, _bytes(self._tensors[name], shape))
            shared = self._aliases.get(name)
            if shared is not None and address != self._addresses.get(shared):
                raise Refused(f"{name} must share the memory of {shared}")
            other = regions.setdefault(address, name)
            if other not in (name, shared) and self._aliases.get(other) != name:
                raise Refused(f"{name} and {other} are the same memory")


def _bytes(tensor: dict[str, Any], shape: tuple[int, ...]) -> int:
    return prod(shape) * np.dtype(NUMPY[DataType[tensor["dtype"]]]).itemsize


def _compute(
    device: Device,
    session: onnxruntime.InferenceSession,
    tensors: dict[str, Any],
    shapes: dict[str, tuple[int, ...]],
    addresses: dict[str, int],
    lives: tuple[Life, Life],
) -> None:
    """What the GPU does when it comes to a step: read its inputs then, not when it was put on the stream."""
    if not all(life.alive for life in lives):
        raise Fault("CUDA_ERROR_ILLEGAL_ADDRESS", "the engine or the context of this step is gone")

    def memory(name: str) -> Allocation:
        return device.memory_at(addresses[name], _bytes(tensors[name], shapes[name]), "CUDA_ERROR_ILLEGAL_ADDRESS")

    def content(name: str) -> np.ndarray:
        size, kind = _bytes(tensors[name], shapes[name]), NUMPY[DataType[tensors[name]["dtype"]]]
        return memory(name).data[:size].view(kind).reshape(shapes[name])

    inputs = [name for name, one in tensors.items() if one["input"]]
    for name in inputs:
        wrote, reads = memory(name).written, _bytes(tensors[name], shapes[name])
        if not name.startswith("past_key_values.") and wrote != reads:
            raise Fault("CUDA_ERROR_ILLEGAL_ADDRESS", f"{name} reads {reads} bytes where the last copy wrote {wrote}")
    device.read_by_steps.append({name: content(name).copy() for name in inputs if not name.startswith("past")})
    outputs = [name for name, one in tensors.items() if not one["input"]]
    if "write_indices" in inputs:
        begin, tokens, slots = content("write_indices"), shapes["input_ids"][1], shapes["attention_mask"][1]
        if begin.min() < 0 or begin.max() + tokens > slots:
            what = f"{tokens} tokens from slot {begin.max()} of {slots}, the lowest from {begin.min()}"
            raise Fault("CUDA_ERROR_ILLEGAL_ADDRESS", f"a write beyond the KV cache: {what}")
    try:
        values = {name: content(name) for name in inputs}
        results = session.run(outputs, {n: widened(v) if v.dtype == np.uint16 else v for n, v in values.items()})
    except Exception as error:  # what its inputs make impossible, an index outside of a table say
        raise Fault("CUDA_ERROR_ILLEGAL_ADDRESS", str(error)) from None
    for name, result in zip(outputs, results, strict=True):
        held = content(name)
        held[:] = narrowed(result) if held.dtype == np.uint16 else result
        memory(name).written = held.nbytes


def _give_back(device: Device, address: int) -> None:
    """Frees what TensorRT allocated; where the context ended before, the real one crashes."""
    if address in device.allocations:
        del device.allocations[address]
    else:
        device.faults.append("an engine or a context outlives CUDA's context")


def module(device: Device, version: str) -> ModuleType:
    """`tensorrt` of a release on a device."""
    made = ModuleType("double_tensorrt")
    made.__version__, made.device = version, device
    for kind in (DataType, Dims, ILogger, IProgressMonitor, MemoryPoolType, NetworkDefinitionCreationFlag):
        setattr(made, kind.__name__, kind)
    for name, kind in (("Runtime", Runtime), ("Builder", building.Builder), ("OnnxParser", building.OnnxParser)):
        setattr(made, name, functools.partial(kind, made))
    return made
