"""The part of the TensorRT double that builds: an engine here is a note of what to run. Nothing here is TensorRT."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx

from tests.support.doubles.double_bf16 import emulated, is_bf16
from tests.support.doubles.double_tensorrt_base import (
    DataType,
    ILogger,
    IProgressMonitor,
    MemoryPoolType,
    NetworkDefinitionCreationFlag,
    Strict,
)

MAGIC = b"an engine of a double of TensorRT"
ELEMENTS = {
    onnx.TensorProto.FLOAT: "FLOAT",
    onnx.TensorProto.FLOAT16: "HALF",
    onnx.TensorProto.BFLOAT16: "BF16",
    onnx.TensorProto.INT8: "INT8",
    onnx.TensorProto.INT64: "INT64",
}
HALVES = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
PHASES = (("Building ENGINE_0", None, 3), ("Tactic selection", "Building ENGINE_0", 5))


def checked(logger: ILogger) -> ILogger:
    """Derived from ILogger and initialised by it: pybind11 refuses others."""
    if not isinstance(logger, ILogger) or not hasattr(logger, "_initialised"):
        raise TypeError("ILogger.__init__() must be called when overriding __init__")
    return logger


class IHostMemory(bytes):
    """Bytes of the library; the real one is a buffer and no bytes."""

    @property
    def nbytes(self) -> int:
        return len(self)


class ITensor(Strict):
    def __init__(self, value: onnx.ValueInfoProto) -> None:
        kind = value.type.tensor_type
        self._name, self._element = value.name, ELEMENTS[kind.elem_type]
        self._labels = [size.dim_param or size.dim_value for size in kind.shape.dim]

    @property
    def name(self) -> str:
        return self._name

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(-1 if isinstance(size, str) else size for size in self._labels)

    @property
    def dtype(self) -> DataType:
        return DataType[self._element]


class ILayer(Strict):
    def __init__(self, name: str) -> None:
        self._name = name

    @property
    def name(self) -> str:
        return self._name


class INetworkDefinition(Strict):
    def __init__(self, flags: int) -> None:
        self._flags, self._graph, self._path = flags, onnx.GraphProto(), Path()

    @property
    def num_inputs(self) -> int:
        return len(self._graph.input)

    @property
    def num_layers(self) -> int:
        return len(self._graph.node)

    def get_input(self, index: int) -> ITensor:
        return ITensor(self._graph.input[index])

    def get_layer(self, index: int) -> ILayer:
        return ILayer(self._graph.node[index].name)


class ParserError(Strict):
    def __init__(self, text: str, node: onnx.NodeProto | None) -> None:
        self._text, self._node = text, node

    def desc(self) -> str:
        return self._text

    def node_name(self) -> str:
        return self._node.name if self._node else ""

    def node_operator(self) -> str:
        return self._node.op_type if self._node else ""


def updates_in_place(version: str) -> bool:
    """Whether a release has KVCacheUpdate, its operator TensorScatter and the engine's aliases."""
    return tuple(map(int, version.split(".")[:2])) >= (10, 15)


def cache_updates(graph: onnx.GraphProto) -> dict[str, str]:
    """Output -> the input whose memory it shares."""
    return {node.output[0]: node.input[0] for node in graph.node if node.op_type == "TensorScatter"}


def misused_update(graph: onnx.GraphProto, node: onnx.NodeProto) -> str:
    """What the real layer asks of its cache; empty where all is well."""
    inputs = {value.name: ITensor(value).shape for value in graph.input}
    if node.input[0] not in inputs:
        return "The KV cache tensor must be a network input."
    if inputs[node.input[0]][2] < 0:
        return "The KV cache tensor must have a static sequence length dimension."
    if node.output[0] not in {value.name for value in graph.output}:
        return "The updated KV cache must be a network output."
    return ""


class OnnxParser(Strict):
    def __init__(self, module: ModuleType, network: INetworkDefinition, logger: ILogger) -> None:
        self._network, self._errors = network, list[ParserError]()
        self._in_place = updates_in_place(module.__version__)
        self._logger = checked(logger)

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> ParserError:
        return self._errors[index]

    def parse_from_file(self, model: str) -> bool:
        """Knows the operators of the standard's own domain."""
        try:
            graph = onnx.load(model, load_external_data=False).graph
        except Exception as error:  # no file, or no ONNX
            self._errors.append(ParserError(f"Failed to parse the ONNX model: {error}", None))
            return False
        for node in graph.node:
            updates = node.op_type == "TensorScatter"
            if node.domain not in ("", "ai.onnx") or (updates and not self._in_place):
                self._errors.append(ParserError("Plugin not found, are the plugin name and version correct?", node))
            elif updates and (misuse := misused_update(graph, node)):
                self._errors.append(ParserError(misuse, node))
        self._network._graph, self._network._path = graph, Path(model)
        return not self._errors


def whole(path: Path) -> onnx.ModelProto:
    """The model with its weights inside. As TensorRT it takes a file that has other names too; onnx.load does not."""
    model = onnx.load(path, load_external_data=False)
    for one in model.graph.initializer:
        where = {entry.key: entry.value for entry in one.external_data}
        if where:
            with (path.parent / where["location"]).open("rb") as file:
                file.seek(int(where.get("offset", 0)))
                one.raw_data = file.read(int(where["length"]))
            one.data_location = onnx.TensorProto.DEFAULT
            del one.external_data[:]
    return model


class IOptimizationProfile(Strict):
    def __init__(self) -> None:
        self._shapes: dict[str, list[tuple[int, ...]]] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:  # noqa: A002  the real names
        if not len(min) == len(opt) == len(max) or not all(
            0 <= a <= b <= c for a, b, c in zip(min, opt, max, strict=True)
        ):
            raise ValueError(f"{input}: {min}, {opt}, {max}")
        self._shapes[input] = [tuple(min), tuple(opt), tuple(max)]


class ITimingCache(Strict):
    def __init__(self, timings: set[str]) -> None:
        self._timings = timings

    def serialize(self) -> IHostMemory:
        return IHostMemory(json.dumps(sorted(self._timings)).encode())


class IBuilderConfig(Strict):
    def __init__(self, device_sm: int) -> None:
        self._profiles: list[IOptimizationProfile] = []
        self._cache: ITimingCache | None = None
        self._monitor: IProgressMonitor | None = None
        self._limits: dict[MemoryPoolType, int] = {}
        self._sm = device_sm

    @property
    def progress_monitor(self) -> IProgressMonitor | None:
        return self._monitor

    @progress_monitor.setter
    def progress_monitor(self, monitor: IProgressMonitor) -> None:
        if not isinstance(monitor, IProgressMonitor) or not hasattr(monitor, "_initialised"):
            raise TypeError("IProgressMonitor.__init__() must be called when overriding __init__")
        self._monitor = monitor

    def set_memory_pool_limit(self, pool: MemoryPoolType, pool_size: int) -> None:
        self._limits[MemoryPoolType(pool)] = int(pool_size)

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache | None:
        try:
            return ITimingCache(set(json.loads(serialized_timing_cache or b"[]")))
        except ValueError:
            return None

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        if not ignore_mismatch and any(not timing.startswith(f"sm{self._sm}:") for timing in cache._timings):
            return False
        self._cache = cache
        return True

    def get_timing_cache(self) -> ITimingCache | None:
        return self._cache

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self._profiles.append(profile)
        return len(self._profiles) - 1


class Builder(Strict):
    def __init__(self, module: ModuleType, logger: ILogger) -> None:
        self._module, self._logger = module, checked(logger)

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        return INetworkDefinition(flags)

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig(self._module.device.sm)

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> IHostMemory | None:
        """Refuses a network that is not strongly typed, or has an input without a shape; times what it never timed."""
        inputs = [ITensor(value) for value in network._graph.input]
        if not network._flags & 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED:
            return self._fail("the network is not strongly typed: its fp16 would run as fp32")
        if len(config._profiles) != 1 or {tensor.name for tensor in inputs} != set(config._profiles[0]._shapes):
            return self._fail("there must be one profile with a shape for every input")
        for node in network._graph.node:
            if (limit := config._limits.get(MemoryPoolType.WORKSPACE, 2**20)) < 2**10:
                return self._fail(f"Could not find any implementation for node {node.name}: workspace {limit}")
            if config._cache is not None:
                config._cache._timings.add(f"sm{config._sm}:{node.op_type}")
        self._tell(config._monitor)
        tensors = {
            value.name: {"dtype": ITensor(value)._element, "shape": ITensor(value)._labels, "input": is_input}
            for values, is_input in ((network._graph.input, True), (network._graph.output, False))
            for value in values
        }
        weights = sum(prod(one.dims) * (2 if one.data_type in HALVES else 4) for one in network._graph.initializer)
        copied = [one for one in network._graph.initializer if one.data_type in self._module.device.dequantised]
        copies = max((2 * prod(one.dims) for one in copied), default=0)
        for label, size in (("Total Weights Memory", weights), ("Total Activation Memory", 3 * 2**19 + copies)):
            self._logger.log(ILogger.Severity.VERBOSE, f"{label}: {size} bytes")
        self._logger.log(ILogger.Severity.VERBOSE, f"Max Scratch Memory: {2**19} bytes")
        plan = {
            "version": self._module.__version__,
            "sm": config._sm,
            "weights": weights,
            "copies": copies,
            "tensors": tensors,
            "aliases": cache_updates(network._graph),
            "profile": config._profiles[0]._shapes,
        }
        model = whole(network._path)
        model = emulated(model) if is_bf16(model) else model
        return IHostMemory(b"\n".join((MAGIC, json.dumps(plan).encode(), model.SerializeToString())))

    def _fail(self, text: str) -> None:
        self._logger.log(ILogger.Severity.ERROR, f"IBuilder::buildSerializedNetwork: Error Code 10: {text}")

    def _tell(self, monitor: IProgressMonitor | None) -> None:
        if monitor is None:
            return
        for name, parent, steps in PHASES:
            monitor.phase_start(name, parent, steps)
        for name, _, steps in reversed(PHASES):
            for step in range(steps):
                if not monitor.step_complete(name, step):
                    raise RuntimeError("the build was stopped")
            monitor.phase_finish(name)
