"""A double of a GPU's memory, streams, events and captured graphs, on the host. Nothing here is CUDA.

What the real thing makes an error is a Fault. What it would not notice, or only by a crash, stands in `faults`
of the device: memory that is left, an engine that outlives its context. A test looks there when it ends.
Work on a stream waits in a queue until somebody waits for it, so that reading too early reads old bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

FIRST_ADDRESS, ALIGNMENT = 0x7F00_0000_0000, 512


class Fault(Exception):
    """A driver call that fails; `code` is a name of CUresult."""

    def __init__(self, code: str, why: str) -> None:
        super().__init__(f"{code}: {why}")
        self.code, self.why = code, why


@dataclass
class Allocation:
    """Bytes on the device. written: how many the last copy or kernel wrote at its begin."""

    address: int
    data: np.ndarray
    owner: str
    written: int = 0


@dataclass
class Life:
    """Whether a thing still is there, for those that only know its address."""

    alive: bool = True


@dataclass
class Work:
    """Something that a stream will do: `ms` on the device's clock, then `run`."""

    run: Callable[[], None]
    ms: float = 0.0
    user: Life | None = None  # what must not end before it ran


@dataclass(eq=False)
class Stream:
    handle: int
    blocking: bool
    queue: list[Work] = field(default_factory=list)
    captured: list[Work] | None = None
    broken: str = ""


@dataclass(eq=False)
class Event:
    recorded: bool = False
    time_ms: float | None = None


@dataclass(eq=False)
class Graph:
    """Captured work, with the addresses and shapes of then."""

    works: list[Work]


class Device:
    """One GPU. per_thread: copies wait for no stream, as where the default stream is one per thread."""

    def __init__(self, memory: int = 2**28, sm: int = 87, count: int = 1, per_thread: bool = False) -> None:
        self.memory, self.sm, self.count, self.per_thread = memory, sm, count, per_thread
        self.name, self.driver = "Double of a GPU", 12060
        self.allocations: dict[int, Allocation] = {}
        self.streams: dict[int, Stream] = {}
        self.made: set[Event | Graph] = set()  # events and graphs that can be launched
        self.retained = self.pushed = 0
        self.copies: list[tuple[str, int, int]] = []  # direction, address, bytes
        self.faults: list[str] = []
        self.launches: list[str] = []  # "step" or "replay"
        self.bound: list[dict[str, int]] = []  # the addresses of every step
        self.read_by_steps: list[dict[str, np.ndarray]] = []  # what every step found in its inputs but the cache
        self.clock_ms = self.host_ms = 0.0
        self.launch_ms, self.replay_ms = 0.5, 0.01  # what the host needs to put a step, a replay on a stream
        self.capturable = True
        self.takes_time = False  # work then lasts as long on the host's clock as on the device's
        self.ledger: Path | None = None  # a file of the MiB in use, as a double of nvidia-smi reads them
        self.dequantised: set[int] = set()  # ONNX types of weights that the builder copies into halves at each step
        self._next, self._dead = FIRST_ADDRESS, ""
        self._under_way: list[tuple[int, bytes]] = []  # copies to the device that returned already
        self._random = np.random.default_rng(0)

    # What a step costs: enough for few of them to fill a warm-up, with a little noise.
    def step_ms(self, tokens: int, past: int) -> float:
        return (20 + 0.5 * tokens + 0.01 * past) * float(self._random.normal(1, 0.002))

    # Context
    def retain(self) -> None:
        if self.count == 0:
            raise Fault("CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected")
        self.retained += 1

    def release(self) -> None:
        """Ends the context with its last user; what is left then is a leak, or dangles."""
        if self.retained == 0:
            raise Fault("CUDA_ERROR_INVALID_CONTEXT", "the primary context is not retained")
        self.retained -= 1
        if self.retained == 0:
            self.faults += self.left()
            self.allocations.clear()
            self.streams.clear()
            self.made.clear()
            self.pushed = 0

    def left(self) -> list[str]:
        """What nobody freed."""
        owners = sorted({memory.owner for memory in self.allocations.values()})
        left = [f"memory of {owner} is left when the context ends" for owner in owners]
        left += ["a stream is left when the context ends"] * len(self.streams)
        return left + [f"{type(one).__name__} is left when the context ends" for one in self.made]

    def check(self) -> None:
        if not self.pushed or not self.retained:
            raise Fault("CUDA_ERROR_INVALID_CONTEXT", "no context is current")
        if self._dead:
            raise Fault(self._dead, "an earlier kernel failed")

    # Memory
    @property
    def used(self) -> int:
        return sum(memory.data.size for memory in self.allocations.values())

    def allocate(self, size: int, owner: str) -> int:
        """What is new holds no zeros but bytes that are no numbers."""
        if size <= 0:
            raise Fault("CUDA_ERROR_INVALID_VALUE", f"{size} bytes")
        if self.used + size > self.memory:
            raise Fault("CUDA_ERROR_OUT_OF_MEMORY", f"out of memory: {size} bytes")
        address = self._next
        self._next += -(-size // ALIGNMENT) * ALIGNMENT + ALIGNMENT
        self.allocations[address] = Allocation(address, np.full(size, 0xFF, np.uint8), owner)
        if self.ledger is not None:
            self.ledger.write_text(str(-(-self.used // 2**20)))
        return address

    def free(self, address: int) -> None:
        if address not in self.allocations:
            raise Fault("CUDA_ERROR_INVALID_VALUE", f"{address:#x} is not allocated")
        if any(stream.queue for stream in self.streams.values()):
            self.faults.append("memory is freed while a stream still works")
        del self.allocations[address]

    def memory_at(self, address: int, size: int, code: str = "CUDA_ERROR_INVALID_VALUE") -> Allocation:
        """The allocation at an address, or what one holds from there on, at a multiple of 256 bytes."""
        memory = self.allocations.get(address)
        for base, one in self.allocations.items() if memory is None else ():
            if base < address < base + one.data.size and (address - base) % 256 == 0:
                memory = Allocation(address, one.data[address - base :], one.owner)
        if memory is None:
            raise Fault(code, f"{address:#x} is not allocated")
        if size > memory.data.size:
            raise Fault(code, f"{size} bytes at {address:#x}, which has {memory.data.size}")
        return memory

    def write(self, address: int, content: bytes, kind: str = "host to device") -> None:
        """A copy on the default stream: it returns before it is done, and only what waits for that stream waits."""
        self._default_stream()
        self.memory_at(address, len(content))
        self._under_way.append((address, content))
        self.copies.append((kind, address, len(content)))

    def read(self, address: int, size: int) -> bytes:
        self._default_stream()
        self.copies.append(("device to host", address, size))
        return self.memory_at(address, size).data[:size].tobytes()

    def _default_stream(self) -> None:
        """The legacy default stream waits for all blocking streams, and cannot be used while one captures."""
        self.check()
        self._arrive()
        if self.per_thread:
            return
        for stream in self.streams.values():
            if not stream.blocking:
                continue
            if stream.captured is not None:
                stream.broken = "the default stream was used"
                raise Fault("CUDA_ERROR_STREAM_CAPTURE_IMPLICIT", "a blocking stream is being captured")
            self.drain(stream)

    def _arrive(self) -> None:
        """What was copied is there."""
        for address, content in self._under_way:
            if address in self.allocations:
                memory = self.allocations[address]
                memory.data[: len(content)] = np.frombuffer(content, np.uint8)
                memory.written = len(content)
        self._under_way.clear()

    def synchronize_all(self) -> None:
        self.check()
        self._arrive()
        for handle in self.streams:
            self.synchronize(handle)

    # Streams
    def stream(self, blocking: bool) -> Stream:
        self.check()
        self._next += ALIGNMENT
        stream = Stream(self._next, blocking)
        self.streams[stream.handle] = stream
        return stream

    def stream_at(self, handle: int) -> Stream:
        self.check()
        if handle not in self.streams:
            raise Fault("CUDA_ERROR_INVALID_HANDLE", f"{handle:#x} is no stream")
        return self.streams[handle]

    def destroy_stream(self, handle: int) -> None:
        del self.streams[self.stream_at(handle).handle]

    def put(self, stream: Stream, work: Work) -> None:
        (stream.queue if stream.captured is None else stream.captured).append(work)

    def synchronize(self, handle: int) -> None:
        stream = self.stream_at(handle)
        if stream.captured is not None:
            stream.broken = "it was waited for"
            raise Fault("CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "a stream that is captured cannot be waited for")
        self.drain(stream)

    def drain(self, stream: Stream) -> None:
        if stream.blocking and not self.per_thread:
            self._arrive()
        while stream.queue:
            work = stream.queue.pop(0)
            self.clock_ms += work.ms
            if self.takes_time:
                time.sleep(work.ms / 1e3)
            try:
                work.run()
            except Fault as fault:
                self._dead = fault.code
                stream.queue.clear()
                raise

    # Events
    def event(self) -> Event:
        self.check()
        event = Event()
        self.made.add(event)
        return event

    def record(self, event: Event, handle: int) -> None:
        if event not in self.made:
            raise Fault("CUDA_ERROR_INVALID_HANDLE", "no such event")
        event.recorded, event.time_ms = True, None

        def note() -> None:
            event.time_ms = self.clock_ms

        self.put(self.stream_at(handle), Work(note))

    def elapsed_ms(self, start: Event, end: Event) -> float:
        self.check()
        if not (start.recorded and end.recorded and {start, end} <= self.made):
            raise Fault("CUDA_ERROR_INVALID_HANDLE", "an event that was not recorded")
        if start.time_ms is None or end.time_ms is None:
            raise Fault("CUDA_ERROR_NOT_READY", "an event that was not reached")
        return end.time_ms - start.time_ms

    # Graphs
    def begin_capture(self, handle: int) -> None:
        stream = self.stream_at(handle)
        if stream.captured is not None:
            raise Fault("CUDA_ERROR_ILLEGAL_STATE", "it is captured already")
        stream.captured, stream.broken = [], ""

    def end_capture(self, handle: int) -> Graph:
        stream = self.stream_at(handle)
        if stream.captured is None:
            raise Fault("CUDA_ERROR_ILLEGAL_STATE", "it is not captured")
        works, stream.captured = stream.captured, None
        if stream.broken:
            raise Fault("CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", stream.broken)
        return Graph(works)

    def instantiate(self, graph: Graph) -> Graph:
        executable = Graph(graph.works)
        self.made.add(executable)
        return executable

    def replay(self, executable: Graph, handle: int) -> None:
        if executable not in self.made:
            raise Fault("CUDA_ERROR_INVALID_HANDLE", "no such graph")
        self.host_ms += self.replay_ms
        self.launches.append("replay")
        self.stream_at(handle).queue += executable.works

    def destroy(self, one: Event | Graph) -> None:
        self.check()
        if one not in self.made:
            raise Fault("CUDA_ERROR_INVALID_HANDLE", "it was destroyed before")
        self.made.remove(one)
