"""Which engine builds and measures for a device, and why; each one behind the same small interface."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

from edgeprune.engine import local, tensorrt
from edgeprune.engine.base import Built, Measured, Performance, Workload
from edgeprune.engine.child import ask
from edgeprune.engine.estimate import ELEMENT_BYTES, buffer_bytes, estimate_performance
from edgeprune.engine.graph import Spelling, graph_weight_bytes
from edgeprune.errors import InputError
from edgeprune.model.decoder import Decoder
from edgeprune.profiles import DeviceProfile

BUILD_TIMEOUT_SECONDS = 3600.0
RUNTIME_GRAPH = Spelling("onnxruntime", "last").filename


@dataclass(frozen=True)
class Exported:
    """A model as graphs on disk: `graphs` holds the spellings, `engine` takes what a build gives."""

    decoder: Decoder
    graphs: Path
    engine: Path


class Engine(Protocol):
    name: str
    reason: str
    builds: bool  # whether a performance needs the exported graphs; an estimate needs the Decoder alone

    def performance(
        self, candidate: Exported, dense: tuple[Exported, Performance] | None, tell: Callable[[str], None]
    ) -> Performance:
        """What the candidate needs and reaches; `dense` is None for the dense model itself."""


@dataclass(frozen=True)
class OnnxRuntime:
    """Built and measured on this machine's processor, interleaved with the dense model."""

    profile: DeviceProfile
    workload: Workload
    precision: str
    reason: str
    name: str = "onnxruntime"
    builds: bool = True

    def performance(
        self, candidate: Exported, dense: tuple[Exported, Performance] | None, tell: Callable[[str], None]
    ) -> Performance:
        size = ELEMENT_BYTES[self.precision]
        measured = local.measure(
            None if dense is None else dense[0].graphs / RUNTIME_GRAPH,
            candidate.graphs / RUNTIME_GRAPH,
            self.workload,
            weight_bytes=graph_weight_bytes(candidate.decoder, self.precision, "onnxruntime", self.workload.context),
            cache_bytes=size * candidate.decoder.cache_elements(self.workload.batch, self.workload.context),
            buffer_bytes=buffer_bytes(candidate.decoder, self.precision, self.workload, self.profile.dialect),
        )
        if dense is None:
            return measured
        # Normalised by the dense model's own figure, so that a busy machine does not pass for a slow candidate.
        return replace(
            measured,
            prefill=_scaled(measured.prefill_ratio, dense[1].prefill),
            decode=_scaled(measured.decode_ratio, dense[1].decode),
        )


def _scaled(ratio: Measured, dense: Measured) -> Measured:
    return replace(dense, value=ratio.value * dense.value, low=ratio.low * dense.value, high=ratio.high * dense.value)


@dataclass(frozen=True)
class TensorRT:
    """Built without the GPU by TensorRT for RTX: the builder's memory; latency from the profile."""

    profile: DeviceProfile
    workload: Workload
    precision: str
    reason: str
    name: str = "tensorrt-rtx"
    builds: bool = True

    def performance(
        self, candidate: Exported, dense: tuple[Exported, Performance] | None, tell: Callable[[str], None]
    ) -> Performance:
        estimated = estimate_performance(candidate.decoder, self.profile, self.workload, self.precision)
        graph = candidate.graphs / Spelling(self.profile.dialect, "last").filename
        candidate.engine.mkdir(parents=True, exist_ok=True)
        plan = candidate.engine / f"model.sm{self.profile.sm}.engine"
        result = build(graph, plan, self.workload, self.profile.sm)
        basis = f"TensorRT for RTX {result.version}, SM {self.profile.sm}, built in {result.seconds:.0f} s"

        def built(value: float, what: str) -> Built:
            return Built(float(value), "bytes", self.profile.name, f"{what}; {basis}")

        memory = replace(
            estimated.memory,
            weights=built(result.weights_bytes, "the builder's total weights memory"),
            activations=built(
                result.activation_bytes + result.scratch_bytes, "the builder's activation and scratch memory"
            ),
        )
        return replace(estimated, memory=memory, notes=tuple(result.warnings))


@dataclass(frozen=True)
class Estimated:
    """No engine can be built here: memory and latency from the profile's figures."""

    profile: DeviceProfile
    workload: Workload
    precision: str
    reason: str
    name: str = "tensorrt"
    builds: bool = False

    def performance(
        self, candidate: Exported, dense: tuple[Exported, Performance] | None, tell: Callable[[str], None]
    ) -> Performance:
        return estimate_performance(candidate.decoder, self.profile, self.workload, self.precision)


def build(graph: Path, plan: Path, workload: Workload, sm: int) -> tensorrt.BuildResult:
    """An engine by TensorRT for RTX, in a process of its own. Raises EngineError."""
    request = {
        "task": f"the build of {graph.name}", "graph": str(graph), "plan": str(plan), "workload": asdict(workload),
        "sm": sm, "flavour": "tensorrt-rtx",
    }  # fmt: skip
    answer = ask("edgeprune.engine.tensorrt", request, BUILD_TIMEOUT_SECONDS)
    return tensorrt.BuildResult(**{**answer, "warnings": tuple(answer["warnings"])})


def choose_engine(asked: str, profile: DeviceProfile, workload: Workload, precision: str) -> Engine:
    """The engine for a device, with the reason.

    asked: `auto` or an engine's name. Raises InputError where the asked one cannot serve the device
    or is not installed.
    """
    names = ("auto", "tensorrt", "tensorrt-rtx", "onnxruntime")
    if asked not in names:
        raise InputError(f"unknown engine {asked!r}", f"Engines are: {', '.join(names)}.")
    if asked not in ("auto", profile.engine):
        raise InputError(
            f"{profile.name} runs {profile.engine}, not {asked}",
            f"Leave --engine out, or choose a device of {asked} (`edgeprune devices`).",
        )
    parts = (profile, workload, precision)
    if profile.engine == "onnxruntime":
        return OnnxRuntime(*parts, reason="the device is this machine's processor")
    available, why = tensorrt.available(profile.engine)
    if asked != "auto" and not available:
        extra = "rtx" if asked == "tensorrt-rtx" else "tensorrt"
        raise InputError(
            f"the engine {asked} is not usable here: {why}",
            f'Install it with `pip install "edgeprune[{extra}]"`, or leave --engine out to estimate.',
        )
    if profile.engine == "tensorrt-rtx" and available:
        return TensorRT(
            *parts, reason=f"TensorRT for RTX builds for SM {profile.sm} without the GPU; nothing ran on it"
        )
    if profile.engine == "tensorrt-rtx":
        return Estimated(*parts, reason=f"nothing could be built: {why}", name="tensorrt-rtx")
    return Estimated(
        *parts,
        reason=f"engines for SM {profile.sm} are built on the device itself, which is not reachable from here: "
        "latency and memory are estimates",
    )
