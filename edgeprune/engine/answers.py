"""Each message of a device as a schema: types, finite figures, bounded sizes and texts. A device is a stranger.

The device's side has none of this: it runs there without pydantic. Tasks on this machine are held to the same schema.
What a message does is not known here, and texts are clean already (ondevice/lines.py).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from edgeprune.errors import BadAnswer
from edgeprune.files import printable
from edgeprune.ondevice import measure
from edgeprune.ondevice.lines import MOST_TEXT
from edgeprune.ondevice.runtimes import GPU_RUNTIMES, RUNTIMES
from edgeprune.ondevice.worker import OnProgress

REMEDY = (
    "Nothing of it was kept. Try again; if it persists, check the clock and the memory of the device, and whether its "
    "python3 is Python itself."
)


Text = Annotated[str, Field(max_length=MOST_TEXT + 10)]
Texts = Annotated[list[Text], Field(max_length=1000)]
Named = Annotated[dict[Text, Text], Field(max_length=1000)]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Bytes = Annotated[int, Field(ge=0, le=1 << 50)]
Amount = Annotated[float, Field(ge=0, le=1e18)]
Latency = Annotated[float, Field(ge=1e-6, le=1e9)]  # ms, or a ratio of two; the reciprocal is finite too
Milliseconds = Annotated[float, Field(ge=-1e9, le=1e9)]  # as a clock gives them, which may be wrong
Seconds = Annotated[float, Field(ge=1e-9, le=1e6)]
_MODULES = {"numpy", *(runtime.module for runtime in RUNTIMES.values())}


class Message(BaseModel):
    """The base of all: strict types, no field that is not asked for, no NaN."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class Hello(Message):
    protocol: int
    python: Text
    work: Text


class Refusal(Message):
    error: Text
    remedy: Text


class Missing(Message):
    missing: Annotated[list[Hash], Field(max_length=10_000)]


class Go(Message):
    go: Literal[True]


class Done(Message):
    done: Literal[True]


class Step(Message):
    progress: Annotated[list[Any], Field(min_length=3, max_length=3)]

    @model_validator(mode="after")
    def _checked(self) -> Step:
        _Progress(stage=self.progress[0], done=self.progress[1], total=self.progress[2])
        return self

    @property
    def state(self) -> tuple[str, int, int]:
        """Returns stage, steps done and steps in all."""
        stage, done, total = self.progress
        return stage, done, total


class _Progress(Message):
    stage: Text
    done: Bytes
    total: Bytes


class Ran(Message):
    answer: dict[str, Any]
    made: Annotated[dict[str, Hash], Field(max_length=100)]


class Size(Message):
    size: Bytes


class Left(Message):
    left: Text | None


class Interval(Message):
    value: Latency
    low: Latency
    high: Latency

    @model_validator(mode="after")
    def _ordered(self) -> Interval:
        if not self.low <= self.value <= self.high:
            raise ValueError("the interval does not hold its median")
        return self


class Percentiles(Message):
    p50: Latency
    p90: Latency
    p99: Latency
    mad: Amount


class Timed(Message):
    percentiles: Percentiles
    median: Interval
    ratio: Interval | None = None


class Gpu(Message):
    name: Text
    sm: Annotated[int, Field(ge=10, le=999)]
    memory: Bytes
    driver: Annotated[int, Field(ge=0, le=10**9)]
    layer: Text


class LlamaBench(Message):
    path: Text
    release: Text
    gpus: Text
    problem: Text


class Description(Message):
    machine: Text
    processor: Text
    python: Text
    modules: Annotated[dict[Text, Text | None], Field(max_length=100)]
    missing: Named
    gpu: Gpu | None
    no_gpu: Text
    llama_bench: LlamaBench | None = None
    memory: Annotated[dict[Text, Annotated[int, Field(ge=-(1 << 50), le=1 << 50)]], Field(max_length=100)]
    platform: Text

    @model_validator(mode="after")
    def _complete(self) -> Description:
        if set(self.modules) != _MODULES:
            raise ValueError(f"the modules are not {', '.join(sorted(_MODULES))}")
        if set(self.missing) != {name for name, version in self.modules.items() if version is None}:
            raise ValueError("the reasons are not those of the missing modules")
        return self


class Build(Message):
    version: Text
    weights_bytes: Bytes
    activation_bytes: Bytes
    scratch_bytes: Bytes
    seconds: Amount
    peak_build_bytes: Bytes
    warnings: Texts


class Agreement(Message):
    cosine: Annotated[float, Field(ge=-1.01, le=1.01)]
    error: Annotated[float, Field(ge=0, le=1e300)]
    equal: Annotated[float, Field(ge=0, le=1)]
    positions: Annotated[int, Field(ge=1, le=1 << 20)]


class Latencies(Message):
    """The answer of a measurement in ONNX Runtime: by the names of its graphs, of which the first has no ratio."""

    prefill: Annotated[dict[str, Timed], Field(max_length=10_000)]
    decode: Annotated[dict[str, Timed], Field(max_length=10_000)]
    device: Text
    conditions: Named


class EngineMemory(Message):
    activations: Bytes
    cache: Bytes
    buffers: Bytes
    used: Annotated[int, Field(ge=-(1 << 50), le=1 << 50)] | None


class OnGpu(Latencies):
    memory: EngineMemory
    gpu: Gpu
    notes: Texts


class ProcessMemory(Message):
    baseline: Bytes
    peak: Bytes


class Processor(Message):
    version: Text
    runtime: Bytes
    processor: Text
    memory: Annotated[float, Field(ge=1, le=1 << 50)]
    cache: Bytes
    available: Bytes | None


class Took(Message):
    seconds: Seconds
    spread: Annotated[float, Field(ge=-1, le=1e9)]


class Probe(Message):
    took: Annotated[dict[str, Took], Field(max_length=100)]
    conditions: Named
    load: Amount = 0.0
    free: Bytes | None = None
    runtime: Annotated[int, Field(ge=-(1 << 50), le=1 << 50)] | None = None
    gpu: Gpu | None = None
    version: Text | None = None


class Weights(Message):
    weights: Bytes


class State(Message):
    folder: Text
    free: Bytes
    gpu_free: Bytes | None
    conditions: Named


class CacheBuffers(Message):
    buffers: Annotated[int, Field(ge=1, le=1 << 20)]
    written: Annotated[int, Field(ge=0, le=1 << 20)]
    kept: Annotated[int, Field(ge=0, le=1 << 20)]


class Clock(Message):
    one: Milliseconds
    least: Milliseconds
    sum: Milliseconds
    many: Milliseconds
    host: Milliseconds


class Capture(Message):
    captured: bool
    layer: Text
    error: Annotated[float, Field(ge=0, le=1e300)] | None

    @model_validator(mode="after")
    def _compared(self) -> Capture:
        if self.captured == (self.error is None):
            raise ValueError("a replay has an error, and nothing else has")
        return self


class MemoryInUse(Message):
    before: Bytes | None
    after: Bytes | None
    activations: Bytes
    cache: Bytes
    buffers: Bytes
    ballast: Bytes


_PROBES: dict[str, type[Message]] = {"inspect": Processor, "time": Probe, "build": Weights}
_CHECKUPS: dict[str, type[Message]] = {
    "state": State,
    "cache": CacheBuffers,
    "clock": Clock,
    "capture": Capture,
    "memory": MemoryInUse,
}
_STEPS = {"probe": _PROBES, "checkup": _CHECKUPS}
_TASKS: dict[str, type[Message]] = {
    "describe": Description,
    "build": Build,
    "check": Agreement,
    "memory": ProcessMemory,
    "serve": Done,  # it serves until the connection ends, and never answers
}
AnyMessage = TypeVar("AnyMessage", bound=Message)


def read_message(kind: type[AnyMessage], document: Any, where: str) -> AnyMessage:
    """Returns a message of that kind. where: the device in words. Raises BadAnswer for anything else."""
    try:
        return kind.model_validate(document)
    except (ValidationError, RecursionError) as error:
        reason = _reason(error) if isinstance(error, ValidationError) else "nested too deeply"
        raise BadAnswer(f"{where} answers what cannot be: {reason}", REMEDY) from None


def _reason(error: ValidationError) -> str:
    """Returns the first thing that is wrong, with its place and the value that stands there."""
    first = error.errors(include_url=False)[0]
    place = ".".join(printable(part, 40) for part in first["loc"][:6])
    words = f"{place} {first['msg'].removeprefix('Value error, ').removeprefix('Input ')}".strip()
    is_shown = isinstance(first["input"], str | int | float | None)
    return printable(words, 200) + (f", it is {printable(repr(first['input']), 40)}" if is_shown else "")


def read_answer(request: dict[str, Any], answer: Any, where: str) -> dict[str, Any]:
    """Returns the answer of a task, with texts that a terminal can show. Raises BadAnswer for any other than asked.

    request: as ondevice.tasks takes it; where: the device in words.
    """
    steps = _STEPS.get(request["do"])
    kind = steps[request["step"]] if steps else _TASKS.get(request["do"])
    if request["do"] == "measure":
        kind = OnGpu if request["engine"] in GPU_RUNTIMES else Latencies
    message = read_message(kind, answer, where)
    if isinstance(message, Latencies):
        names = ["candidate"] if isinstance(message, OnGpu) else list(request["files"])
        for timed in (message.prefill, message.decode):
            if list(timed) != names or any(timed[name].ratio is None for name in names[1:]):
                raise BadAnswer(f"{where} answers with times of other graphs than were asked for", REMEDY)
    if isinstance(message, Probe) and set(message.took) != set(request["files"]):
        raise BadAnswer(f"{where} answers with times of other graphs than were asked for", REMEDY)
    return message.model_dump(exclude_unset=True)


class ThisMachine(measure.LocalSession):
    """A session on this machine whose answers are held to the schema of a device's."""

    def run(self, request: dict[str, Any], timeout_seconds: float, on_progress: OnProgress) -> dict[str, Any]:
        """Runs a task in a process of its own and returns its answer. Raises EngineError."""
        return read_answer(request, super().run(request, timeout_seconds, on_progress), "this machine")
