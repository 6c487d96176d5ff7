"""A double of pycuda and pycuda.driver, with the names of theirs that are used here. Nothing here is pycuda."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from tests.support.doubles import double_device

VERSION_TEXT = "2026.1"


class Error(Exception):
    """The base of pycuda's errors."""


class LogicError(Error):
    """Raised for most codes."""


class MemoryError(Error):  # noqa: A001  the real one has this name
    """Out of memory."""


class RuntimeError(Error):  # noqa: A001  the real one has this name
    """Raised by init, among others."""


KINDS = {"CUDA_ERROR_OUT_OF_MEMORY": MemoryError, "CUDA_ERROR_NO_DEVICE": RuntimeError}


def called(name: str, call: Any, *arguments: Any) -> Any:
    """A call of the device, its fault as pycuda's own error."""
    try:
        return call(*arguments)
    except double_device.Fault as fault:
        raise KINDS.get(fault.code, LogicError)(f"{name} failed: {fault.why}") from None


class Lease:
    """The primary context, retained until the Context and all that was made in it are gone, in whichever order."""

    def __init__(self, device: double_device.Device) -> None:
        self._device, self._holders = device, 0
        called("cuDevicePrimaryCtxRetain", device.retain)

    def take(self) -> None:
        self._holders += 1

    def give(self) -> None:
        self._holders -= 1
        if self._holders == 0:
            self._device.release()


class Context:
    def __init__(self, device: double_device.Device) -> None:
        self._device, self._lease = device, Lease(device)
        self._lease.take()

    def __del__(self) -> None:
        self._lease.give()

    def push(self) -> None:
        self._device.pushed += 1
        _STACK.append(self)

    @staticmethod
    def synchronize() -> None:
        called("cuCtxSynchronize", _current()._device.synchronize_all)

    @staticmethod
    def pop() -> None:
        if not _STACK:
            raise LogicError("cuCtxPopCurrent failed: invalid device context")
        _STACK.pop()._device.pushed -= 1


_STACK: list[Context] = []


class DeviceAllocation:
    """Memory that is freed with its last reference."""

    def __init__(self, context: Context, size: int) -> None:
        self._lease, self._device = context._lease, context._device
        self._address: int | None = None
        self._lease.take()
        called("cuMemAlloc", self._device.check)
        self._address = called("cuMemAlloc", self._device.allocate, size, "pycuda")

    def __int__(self) -> int:
        if self._address is None:
            raise LogicError("the memory is freed")
        return self._address

    def free(self) -> None:
        called("cuMemFree", self._device.free, int(self))
        self._address = None

    def __del__(self) -> None:
        if self._address is not None:
            self.free()
        self._lease.give()


class Stream:
    """flags 0 is a blocking stream: it waits for the default stream, and that for it."""

    def __init__(self, flags: int = 0) -> None:
        self._lease, self._device = _current()._lease, _current()._device
        self._stream = called("cuStreamCreate", self._device.stream, flags == 0)
        self._lease.take()

    @property
    def handle(self) -> int:
        return self._stream.handle

    def synchronize(self) -> None:
        called("cuStreamSynchronize", self._device.synchronize, self.handle)

    def __del__(self) -> None:
        if hasattr(self, "_stream"):
            self._device.streams.pop(self.handle, None)  # the real one makes its context current for this
            self._lease.give()


class Event:
    def __init__(self, flags: int = 0) -> None:
        self._lease, self._device = _current()._lease, _current()._device
        self._event = called("cuEventCreate", self._device.event)
        self._lease.take()

    def record(self, stream: Stream) -> Event:
        called("cuEventRecord", self._device.record, self._event, stream.handle)
        return self

    def time_till(self, other: Event) -> float:
        return called("cuEventElapsedTime", self._device.elapsed_ms, self._event, other._event)

    def __del__(self) -> None:
        if hasattr(self, "_event"):
            self._device.made.discard(self._event)
            self._lease.give()


def _current() -> Context:
    if not _STACK:
        raise LogicError("invalid device context - no currently active context?")
    return _STACK[-1]


def module(device: double_device.Device) -> tuple[ModuleType, ModuleType]:
    """`pycuda` and `pycuda.driver` on a device."""

    class Device:
        def __init__(self, number: int) -> None:
            if number >= device.count:
                raise LogicError("cuDeviceGet failed: invalid device ordinal")

        @staticmethod
        def count() -> int:
            return device.count

        def name(self) -> str:
            return device.name

        def compute_capability(self) -> tuple[int, int]:
            return divmod(device.sm, 10)

        def total_memory(self) -> int:
            return device.memory

        def retain_primary_context(self) -> Context:
            return Context(device)

    def init(flags: int = 0) -> None:
        if device.count == 0:
            raise RuntimeError("cuInit failed: no CUDA-capable device is detected")

    def memcpy_htod(dest: Any, src: np.ndarray) -> None:
        if not src.flags.c_contiguous:
            raise ValueError("ndarray is not contiguous")
        called("cuMemcpyHtoD", device.write, int(dest), src.tobytes())

    def memcpy_dtoh(dest: np.ndarray, src: Any) -> None:
        if not dest.flags.c_contiguous or not dest.flags.writeable:
            raise ValueError("ndarray is not contiguous")
        dest.reshape(-1).view(np.uint8)[:] = np.frombuffer(
            called("cuMemcpyDtoH", device.read, int(src), dest.nbytes), np.uint8
        )

    def memset_d8(dest: Any, data: int, size: int) -> None:
        called("cuMemsetD8", device.write, int(dest), bytes([data]) * size, "set")

    package, driver = ModuleType("double_pycuda"), ModuleType("double_pycuda.driver")
    package.VERSION_TEXT = VERSION_TEXT
    names = {
        "Context": Context,
        "Device": Device,
        "DeviceAllocation": DeviceAllocation,
        "Error": Error,
        "Event": Event,
        "LogicError": LogicError,
        "MemoryError": MemoryError,
        "RuntimeError": RuntimeError,
        "Stream": Stream,
        "get_driver_version": lambda: device.driver,
        "init": init,
        "mem_alloc": lambda size: DeviceAllocation(_current(), size),
        "mem_get_info": lambda: (device.memory - device.used, device.memory),
        "memcpy_dtoh": memcpy_dtoh,
        "memcpy_htod": memcpy_htod,
        "memset_d8": memset_d8,
    }
    vars(driver).update(names)
    _STACK.clear()
    return package, driver
