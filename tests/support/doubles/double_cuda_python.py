"""A double of cuda.bindings.driver, with the names of it that are used here. Nothing here is cuda-python.

Every call returns a tuple that begins with a CUresult, as the real ones do; pointers to host memory are addresses.
"""

from __future__ import annotations

import ctypes
import enum
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from tests.support.doubles import double_device

VERSION = "12.9.10"


class CUresult(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_INVALID_CONTEXT = 201
    CUDA_ERROR_INVALID_HANDLE = 400
    CUDA_ERROR_ILLEGAL_STATE = 401
    CUDA_ERROR_NOT_READY = 600
    CUDA_ERROR_ILLEGAL_ADDRESS = 700
    CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900
    CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901
    CUDA_ERROR_STREAM_CAPTURE_IMPLICIT = 906


class CUstreamCaptureMode(enum.IntEnum):
    CU_STREAM_CAPTURE_MODE_GLOBAL = 0
    CU_STREAM_CAPTURE_MODE_THREAD_LOCAL = 1
    CU_STREAM_CAPTURE_MODE_RELAXED = 2


class CUdevice_attribute(enum.IntEnum):
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76


@dataclass(frozen=True)
class Handle:
    """What the module gives for pointers, streams and the rest; `thing` is the device's own."""

    number: int
    thing: Any = None

    def __int__(self) -> int:
        return self.number


class CUdeviceptr(Handle): ...


class CUstream(Handle): ...


class CUevent(Handle): ...


class CUgraph(Handle): ...


class CUgraphExec(Handle): ...


class CUdevice(Handle): ...


class CUcontext(Handle): ...


class Calls:
    """The calls on a device. Each plain method here becomes one that returns (CUresult, results...)."""

    def __init__(self, device: double_device.Device) -> None:
        self._device, self._initialised = device, False

    def _is(self, kind: type[Handle], *values: Any) -> None:
        """The real module takes its own types and plain numbers, nothing else."""
        for value in values:
            if not isinstance(value, kind | int):
                raise TypeError(f"Argument has an incorrect type: expected {kind.__name__}, got {type(value).__name__}")

    def cuInit(self, flags: int) -> None:
        if self._device.count == 0:
            raise double_device.Fault("CUDA_ERROR_NO_DEVICE", "no device")

    def cuDriverGetVersion(self) -> int:
        return self._device.driver

    def cuDeviceGetCount(self) -> int:
        return self._device.count

    def cuDeviceGet(self, ordinal: int) -> CUdevice:
        return CUdevice(ordinal)

    def cuDeviceGetName(self, length: int, device: CUdevice) -> bytes:
        return self._device.name.encode().ljust(length, b"\0")

    def cuDeviceGetAttribute(self, attribute: CUdevice_attribute, device: CUdevice) -> int:
        return divmod(self._device.sm, 10)[attribute - 75]

    def cuDevicePrimaryCtxRetain(self, device: CUdevice) -> CUcontext:
        self._is(CUdevice, device)
        self._device.retain()
        return CUcontext(1)

    def cuDevicePrimaryCtxRelease(self, device: CUdevice) -> None:
        self._device.release()

    def cuCtxSetCurrent(self, context: CUcontext) -> None:
        self._is(CUcontext, context)
        self._device.pushed = 1

    def cuCtxSynchronize(self) -> None:
        self._device.synchronize_all()

    def cuMemGetInfo(self) -> tuple[int, int]:
        self._device.check()
        return self._device.memory - self._device.used, self._device.memory

    def cuMemAlloc(self, size: int) -> CUdeviceptr:
        self._device.check()
        return CUdeviceptr(self._device.allocate(size, "cuda-python"))

    def cuMemFree(self, pointer: CUdeviceptr) -> None:
        self._device.check()
        self._device.free(int(pointer))

    def cuMemsetD8(self, pointer: CUdeviceptr, value: int, size: int) -> None:
        self._device.write(int(pointer), bytes([value]) * size, "set")

    def cuMemcpyHtoD(self, pointer: CUdeviceptr, host: int, size: int) -> None:
        self._device.write(int(pointer), ctypes.string_at(host, size))

    def cuMemcpyDtoH(self, host: int, pointer: CUdeviceptr, size: int) -> None:
        ctypes.memmove(host, self._device.read(int(pointer), size), size)

    def cuStreamCreate(self, flags: int) -> CUstream:
        stream = self._device.stream(flags == 0)
        return CUstream(stream.handle)

    def cuStreamSynchronize(self, stream: CUstream) -> None:
        self._device.synchronize(int(stream))

    def cuStreamDestroy(self, stream: CUstream) -> None:
        self._device.destroy_stream(int(stream))

    def cuStreamBeginCapture(self, stream: CUstream, mode: CUstreamCaptureMode) -> None:
        if not isinstance(mode, CUstreamCaptureMode):
            raise TypeError(f"Argument 'mode' has incorrect type: {type(mode).__name__}")
        self._device.begin_capture(int(stream))

    def cuStreamEndCapture(self, stream: CUstream) -> CUgraph:
        return CUgraph(1, self._device.end_capture(int(stream)))

    def cuEventCreate(self, flags: int) -> CUevent:
        return CUevent(1, self._device.event())

    def cuEventDestroy(self, event: CUevent) -> None:
        self._device.destroy(event.thing)

    def cuEventRecord(self, event: CUevent, stream: CUstream) -> None:
        self._device.record(event.thing, int(stream))

    def cuEventElapsedTime(self, start: CUevent, end: CUevent) -> float:
        return self._device.elapsed_ms(start.thing, end.thing)

    def cuGraphInstantiate(self, graph: CUgraph, flags: int) -> CUgraphExec:
        return CUgraphExec(1, self._device.instantiate(graph.thing))

    def cuGraphDestroy(self, graph: CUgraph) -> None:
        self._is(CUgraph, graph)

    def cuGraphLaunch(self, executable: CUgraphExec, stream: CUstream) -> None:
        self._device.replay(executable.thing, int(stream))

    def cuGraphExecDestroy(self, executable: CUgraphExec) -> None:
        self._device.destroy(executable.thing)


RESULTS = {  # how many results a call has when it fails: they are None then
    name: 0 if call.__annotations__["return"] == "None" else 2 if "tuple" in call.__annotations__["return"] else 1
    for name, call in vars(Calls).items()
    if name.startswith("cu")
}
TYPES = (
    CUresult,
    CUstreamCaptureMode,
    CUdevice_attribute,
    CUdeviceptr,
    CUstream,
    CUevent,
    CUgraph,
    CUgraphExec,
    CUdevice,
    CUcontext,
)


def module(device: double_device.Device) -> ModuleType:
    """`cuda.bindings.driver` on a device."""

    def returning_codes(name: str, call: Callable[..., Any]) -> Callable[..., tuple[Any, ...]]:
        def wrapped(*arguments: Any) -> tuple[Any, ...]:
            try:
                result = call(*arguments)
            except double_device.Fault as fault:
                return CUresult[fault.code], *[None] * RESULTS[name]
            results = result if RESULTS[name] == 2 else (result,) * RESULTS[name]
            return CUresult.CUDA_SUCCESS, *results

        return wrapped

    made = ModuleType("double_cuda_python")
    made.__version__ = VERSION
    calls = Calls(device)
    for name in RESULTS:
        setattr(made, name, returning_codes(name, getattr(calls, name)))
    for kind in TYPES:
        setattr(made, kind.__name__, kind)
    return made
