"""The CUDA layer of the engines: memory, one stream, events, captured graphs.

It uses pycuda where that is installed, else cuda-python; nothing above this file knows which. This file also runs on
the device: Python 3.10, numpy and one of the two modules. It knows no TensorRT. pycuda (2026.1) cannot capture
graphs: `capture` returns None there.
"""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from edgeprune.errors import EngineError

INSTALL = "Install one of them on the device: pip install cuda-python (wheels, no compiler), or pycuda."
NO_GPU = "Run it on the device, or give --target ssh://USER@DEVICE."
BROKEN = f"Check whether nvidia-smi finds the GPU (tegrastats on a Jetson). {NO_GPU}"


@dataclass(frozen=True)
class Gpu:
    """The GPU that is used; sm: the compute capability times 10; memory: in bytes."""

    name: str
    sm: int
    memory: int
    driver: int  # CUDA version of the driver, 12060 for 12.6
    layer: str  # pycuda or cuda-python, with its version


class Driver(Protocol):
    """The interface to a CUDA module. Memory, streams and events are the module's objects; addresses are int.

    Copies are made on the default stream, and may return before the device has the bytes: `settle` waits for that.
    Whether other streams wait is set by an environment variable (CUDA_PYTHON_CUDA_PER_THREAD_DEFAULT_STREAM).
    """

    layer: str

    def gpu(self) -> Gpu: ...
    def free_bytes(self) -> int: ...
    def allocate(self, size: int) -> Any: ...
    def free(self, memory: Any) -> None: ...
    def address(self, memory: Any) -> int: ...
    def clear(self, memory: Any, size: int) -> None: ...
    def upload(self, memory: Any, array: np.ndarray) -> None: ...
    def settle(self) -> None: ...
    def download(self, array: np.ndarray, memory: Any) -> None: ...
    def stream(self) -> Any: ...
    def handle(self, stream: Any) -> int: ...
    def synchronize(self, stream: Any) -> None: ...
    def event(self) -> Any: ...
    def record(self, event: Any, stream: Any) -> None: ...
    def elapsed_ms(self, start: Any, end: Any) -> float: ...
    def capture(self, work: Callable[[], None], stream: Any) -> Callable[[], None] | None: ...
    def close(self) -> None: ...


class Cuda:
    """A context on the first GPU with one stream; `close` frees all that it allocates.

    Raises EngineError where neither module works, no GPU is found, its memory is full or its work fails.
    """

    def __init__(self) -> None:
        self._driver = _open()
        self._closed = False
        self._buffers: dict[int, tuple[Any, int]] = {}
        try:
            self.gpu = self._driver.gpu()
            self._stream = self._driver.stream()
            self._begin, self._end = self._driver.event(), self._driver.event()
        except Exception as error:  # each module has its own errors, which the message quotes
            self._driver.close()
            raise EngineError(f"the GPU cannot be used: {error}", BROKEN) from None

    def __enter__(self) -> Cuda:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def stream(self) -> int:
        """The handle of the stream, as TensorRT takes it."""
        return self._driver.handle(self._stream)

    def size_of(self, address: int) -> int:
        """Returns the bytes that were allocated at an address."""
        return self._buffers[address][1]

    def allocate(self, size: int) -> int:
        """Allocates `size` bytes (one at least) and returns their address; all of them are zero.

        Raises EngineError where the GPU has no room.
        """
        size = max(1, size)
        try:
            memory = self._driver.allocate(size)
        except Exception as error:  # each module has its own errors, which the message quotes
            raise EngineError(
                f"the GPU has no {size / 2**20:.0f} MiB left "
                f"({self._driver.free_bytes() / 2**20:.0f} MiB free): {error}",
                "Close what else uses the GPU, or take a smaller --batch or --context.",
            ) from None
        address = self._driver.address(memory)
        self._buffers[address] = (memory, size)
        self._driver.clear(memory, size)
        self._driver.settle()
        return address

    def upload(self, address: int, array: np.ndarray) -> None:
        """Copies an array to an allocated address, after the stream's work, which may still read from there.

        Raises ValueError where the array does not fit.
        """
        self.synchronize()
        self._driver.upload(self._checked(address, array), np.ascontiguousarray(array))
        self._driver.settle()

    def download(self, array: np.ndarray, address: int) -> None:
        """Fills a contiguous array from an allocated address, after the stream's work.

        Raises ValueError where the array is larger than what was allocated.
        """
        self.synchronize()
        self._driver.download(array, self._checked(address, array))

    def synchronize(self) -> None:
        """Waits for the stream's work. Raises EngineError where it failed."""
        try:
            self._driver.synchronize(self._stream)
        except Exception as error:  # each module has its own errors, which the message quotes
            raise EngineError(
                f"the GPU failed: {error}", "Try again; if it fails again, see `dmesg` on the device, and restart it."
            ) from None

    def time_ms(self, work: Callable[[], None]) -> tuple[float, float]:
        """Returns the milliseconds that the GPU takes for work, and those that putting the work on the stream takes."""
        self._driver.record(self._begin, self._stream)
        start = time.perf_counter()
        work()
        enqueue_ms = 1e3 * (time.perf_counter() - start)
        self._driver.record(self._end, self._stream)
        self.synchronize()
        return self._driver.elapsed_ms(self._begin, self._end), enqueue_ms

    def capture(self, work: Callable[[], None]) -> Callable[[], None] | None:
        """Returns a function that replays the work as one CUDA graph; None where module or work do not allow it."""
        self.synchronize()
        return self._driver.capture(work, self._stream)

    def close(self) -> None:
        """Frees everything. Failures are ignored: after an error of the GPU, which was reported, every call fails."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(Exception):
            self.synchronize()
        for memory, _ in self._buffers.values():
            with contextlib.suppress(Exception):
                self._driver.free(memory)
        self._buffers.clear()
        self._stream = self._begin = self._end = None  # pycuda destroys objects that nobody holds
        self._driver.close()

    def _checked(self, address: int, array: np.ndarray) -> Any:
        """Returns the memory at an address. Raises ValueError where the array is larger."""
        memory, size = self._buffers[address]
        if array.nbytes > size:
            raise ValueError(f"{array.nbytes} bytes into a buffer of {size}")
        return memory


def find_gpu() -> Gpu:
    """Returns the first GPU. Raises EngineError where there is no GPU, or no module to reach it."""
    with Cuda() as cuda:
        return cuda.gpu


def _open() -> Driver:
    """Opens the GPU with the first module that works. Raises EngineError with the reasons of both."""
    reasons, installed = [], False
    for driver in (_PyCuda, _CudaPython):
        try:
            return driver()
        except EngineError:
            raise
        except Exception as error:  # a missing module, library, driver or GPU raises an error of its own
            reasons.append(f"{driver.module}: {str(error) or type(error).__name__}")
            installed |= not isinstance(error, ModuleNotFoundError)
    raise EngineError(f"no CUDA module works here ({'; '.join(reasons)})", BROKEN if installed else INSTALL)


class _PyCuda:
    """The driver that uses pycuda."""

    module = "pycuda"

    def __init__(self) -> None:
        self._cuda = importlib.import_module("pycuda.driver")
        self._cuda.init()
        if self._cuda.Device.count() == 0:
            raise EngineError("no NVIDIA GPU is found", NO_GPU)
        self._device = self._cuda.Device(0)
        version = importlib.import_module("pycuda").VERSION_TEXT
        self.layer = f"pycuda {version}"
        self._context = self._device.retain_primary_context()
        self._context.push()

    def gpu(self) -> Gpu:
        major, minor = self._device.compute_capability()
        return Gpu(
            self._device.name(),
            10 * major + minor,
            self._device.total_memory(),
            self._cuda.get_driver_version(),
            self.layer,
        )

    def free_bytes(self) -> int:
        return int(self._cuda.mem_get_info()[0])

    def allocate(self, size: int) -> Any:
        return self._cuda.mem_alloc(size)

    def free(self, memory: Any) -> None:
        memory.free()

    def address(self, memory: Any) -> int:
        return int(memory)

    def clear(self, memory: Any, size: int) -> None:
        self._cuda.memset_d8(memory, 0, size)

    def upload(self, memory: Any, array: np.ndarray) -> None:
        self._cuda.memcpy_htod(memory, array)

    def settle(self) -> None:
        self._context.synchronize()

    def download(self, array: np.ndarray, memory: Any) -> None:
        self._cuda.memcpy_dtoh(array, memory)

    def stream(self) -> Any:
        return self._cuda.Stream()

    def handle(self, stream: Any) -> int:
        return stream.handle

    def synchronize(self, stream: Any) -> None:
        stream.synchronize()

    def event(self) -> Any:
        return self._cuda.Event()

    def record(self, event: Any, stream: Any) -> None:
        event.record(stream)

    def elapsed_ms(self, start: Any, end: Any) -> float:
        return start.time_till(end)

    def capture(self, work: Callable[[], None], stream: Any) -> Callable[[], None] | None:
        return None

    def close(self) -> None:
        self._context.pop()


class _CudaPython:
    """The driver that uses cuda-python."""

    module = "cuda-python"

    def __init__(self) -> None:
        try:
            self._cuda = importlib.import_module("cuda.bindings.driver")
        except ImportError:  # before 12.8 the module had another name
            self._cuda = importlib.import_module("cuda.cuda")
        self._call("cuInit", 0)
        if self._call("cuDeviceGetCount") == 0:
            raise EngineError("no NVIDIA GPU is found", NO_GPU)
        version = getattr(self._cuda, "__version__", None) or _version_of("cuda-bindings", "cuda-python")
        self.layer = f"cuda-python {version}"
        self._device = self._call("cuDeviceGet", 0)
        # The context lives on where something else holds it, so whatever is made in it is destroyed one by one.
        self._made = contextlib.ExitStack()
        context = self._call("cuDevicePrimaryCtxRetain", self._device)
        self._made.callback(self._call, "cuDevicePrimaryCtxRelease", self._device)
        self._call("cuCtxSetCurrent", context)

    def _call(self, name: str, *arguments: Any) -> Any:
        """Returns the result of a driver call. Raises RuntimeError with the call and the driver's error."""
        code, *results = getattr(self._cuda, name)(*arguments)
        if code != self._cuda.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"{name}: {code.name}")
        return results[0] if len(results) == 1 else results

    def gpu(self) -> Gpu:
        kinds = self._cuda.CUdevice_attribute
        major, minor = (
            self._call(
                "cuDeviceGetAttribute", getattr(kinds, f"CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_{part}"), self._device
            )
            for part in ("MAJOR", "MINOR")
        )
        name = self._call("cuDeviceGetName", 256, self._device).split(b"\0")[0].decode()
        memory = int(self._call("cuMemGetInfo")[1])
        return Gpu(name, 10 * major + minor, memory, self._call("cuDriverGetVersion"), self.layer)

    def free_bytes(self) -> int:
        return int(self._call("cuMemGetInfo")[0])

    def allocate(self, size: int) -> Any:
        return self._call("cuMemAlloc", size)

    def free(self, memory: Any) -> None:
        self._call("cuMemFree", memory)

    def address(self, memory: Any) -> int:
        return int(memory)

    def clear(self, memory: Any, size: int) -> None:
        self._call("cuMemsetD8", memory, 0, size)

    def upload(self, memory: Any, array: np.ndarray) -> None:
        self._call("cuMemcpyHtoD", memory, array.ctypes.data, array.nbytes)

    def settle(self) -> None:
        self._call("cuCtxSynchronize")

    def download(self, array: np.ndarray, memory: Any) -> None:
        self._call("cuMemcpyDtoH", array.ctypes.data, memory, array.nbytes)

    def stream(self) -> Any:
        stream = self._call("cuStreamCreate", 0)
        self._made.callback(self._call, "cuStreamDestroy", stream)
        return stream

    def handle(self, stream: Any) -> int:
        return int(stream)

    def synchronize(self, stream: Any) -> None:
        self._call("cuStreamSynchronize", stream)

    def event(self) -> Any:
        event = self._call("cuEventCreate", 0)
        self._made.callback(self._call, "cuEventDestroy", event)
        return event

    def record(self, event: Any, stream: Any) -> None:
        self._call("cuEventRecord", event, stream)

    def elapsed_ms(self, start: Any, end: Any) -> float:
        return self._call("cuEventElapsedTime", start, end)

    def capture(self, work: Callable[[], None], stream: Any) -> Callable[[], None] | None:
        # Record the work instead of running it.
        mode = self._cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call("cuStreamBeginCapture", stream, mode)
        refused = False
        try:
            work()
        except EngineError:  # some engines refuse a step while their stream is captured
            refused = True
        finally:
            code, graph = self._cuda.cuStreamEndCapture(stream)
        # A capture that failed, or whose work was refused, gives no replay.
        if code != self._cuda.CUresult.CUDA_SUCCESS:
            return None
        if refused:
            self._call("cuGraphDestroy", graph)
            return None
        # Make it executable; it is destroyed when the driver is closed.
        try:
            executable = self._call("cuGraphInstantiate", graph, 0)
        except RuntimeError:
            return None
        finally:
            self._call("cuGraphDestroy", graph)
        self._made.callback(self._call, "cuGraphExecDestroy", executable)
        return lambda: self._call("cuGraphLaunch", executable, stream)

    def close(self) -> None:
        with contextlib.suppress(RuntimeError):  # after an error of the GPU every call fails, but all are tried
            self._made.close()


def _version_of(*names: str) -> str:
    """Returns the version of the first of these packages that is installed."""
    from importlib.metadata import PackageNotFoundError, version

    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "of unknown version"
