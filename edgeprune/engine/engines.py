"""The engines that build and measure candidates, behind one small interface; they know nothing about budgets."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from edgeprune.engine.estimate import counted, estimate_performance, workspace_bytes
from edgeprune.engine.onnx.graph import GraphVariant
from edgeprune.errors import EngineError
from edgeprune.model.decoder import Decoder
from edgeprune.ondevice import measure
from edgeprune.ondevice.durations import timing
from edgeprune.ondevice.figures import Built, Estimate, Figure, Performance, Workload
from edgeprune.ondevice.measure import Here, Session
from edgeprune.ondevice.onnxruntime import GRAPH_FILE
from edgeprune.ondevice.tensorrt import BuildResult
from edgeprune.ondevice.worker import Tell
from edgeprune.profiles import DeviceProfile


@dataclass(frozen=True)
class Exported:
    """A model on disk: `graphs` holds the variants, `engine` takes what a build gives, `reference` its logits."""

    decoder: Decoder
    graphs: Path
    engine: Path
    reference: Path


class Engine(Protocol):
    name: str
    reason: str
    builds: bool  # whether a performance needs the exported graphs; an estimate needs the Decoder alone
    measures: bool  # whether latencies are measured

    def performance(self, candidate: Exported, dense: tuple[Exported, Performance] | None, tell: Tell) -> Performance:
        """What the candidate needs and reaches; `dense` is None for the dense model itself."""


class Measuring(Engine, Protocol):
    """An engine that measures latencies."""

    def identity(self, tell: Tell) -> dict[str, Any]:
        """The device and the engine's version: what a latency holds for."""

    def latencies(self, models: dict[str, Exported], tell: Tell) -> dict[str, dict[str, float]]:
        """Prefill and decode of several models by kind and name, on one scale. Raises EngineError."""


@dataclass(frozen=True)
class OnnxRuntime:
    """Built and measured on a processor, interleaved with the dense model."""

    profile: DeviceProfile
    workload: Workload
    precision: str
    reason: str
    session: Session = Here()
    name: str = "onnxruntime"
    builds: bool = True
    measures: bool = True

    def performance(self, candidate: Exported, dense: tuple[Exported, Performance] | None, tell: Tell) -> Performance:
        measured = measure.on_onnxruntime(
            self.session,
            None if dense is None else dense[0].graphs / GRAPH_FILE,
            candidate.graphs / GRAPH_FILE,
            self.workload,
            counted(candidate.decoder, self.precision, self.workload),
            tell,
            candidate.reference,
            self.precision,
        )
        if dense is None:
            return measured
        # Normalised by the dense model's own figure, so that a busy machine does not pass for a slow candidate.
        return replace(
            measured,
            prefill=measure.scaled(measured.prefill_ratio, dense[1].prefill),
            decode=measure.scaled(measured.decode_ratio, dense[1].decode),
        )

    def identity(self, tell: Tell) -> dict[str, Any]:
        found = measure.describe(self.session, tell)
        return {"processor": found["processor"], "onnxruntime": found["modules"]["onnxruntime"]}

    def latencies(self, models: dict[str, Exported], tell: Tell) -> dict[str, dict[str, float]]:
        graphs = {name: model.graphs / GRAPH_FILE for name, model in models.items()}
        seconds = timing().survey_seconds * len(models)
        return measure.relative_latencies(self.session, graphs, self.workload, seconds, tell)


@dataclass(frozen=True)
class TensorRT:
    """Built, checked and measured on the GPU itself, here or behind a session."""

    profile: DeviceProfile
    workload: Workload
    precision: str
    reason: str
    name: str
    session: Session = Here()
    builds: bool = True
    measures: bool = True

    def performance(self, candidate: Exported, dense: tuple[Exported, Performance] | None, tell: Tell) -> Performance:
        graph = candidate.graphs / GraphVariant(self.profile.dialect, "last").filename
        plan = _plan(candidate, self.profile)
        built = measure.build(
            self.session,
            self.name,
            graph,
            plan,
            self.workload,
            tell,
            workspace_bytes=workspace_bytes(candidate.decoder, self.profile, self.workload, self.precision),
        )
        runtime = estimate_performance(candidate.decoder, self.profile, self.workload, self.precision).memory.runtime
        found = measure.on_tensorrt(
            self.session, self.name, plan, built, self.workload, runtime, candidate.reference, self.precision, tell
        )
        if dense is None:
            return found
        # The runtime's part is the same for both; what other programs did meanwhile must not decide on a candidate.
        return replace(found, memory=replace(found.memory, runtime=dense[1].memory.runtime))

    def identity(self, tell: Tell) -> dict[str, Any]:
        found = measure.describe(self.session, tell)
        version = found["modules"][self.name.replace("-", "_")]
        return {"machine": found["machine"], "gpu": found["gpu"]["name"], "engine": self.name, "version": version}

    def latencies(self, models: dict[str, Exported], tell: Tell) -> dict[str, dict[str, float]]:
        found: dict[str, dict[str, float]] = {}
        for name, model in models.items():
            graph, plan = model.graphs / GraphVariant(self.profile.dialect, "last").filename, _plan(model, self.profile)
            workspace = workspace_bytes(model.decoder, self.profile, self.workload, self.precision)
            measure.build(self.session, self.name, graph, plan, self.workload, tell, workspace_bytes=workspace)
            seconds = 2 * timing().survey_seconds
            times = measure.engine_latencies(self.session, self.name, plan, self.workload, seconds, tell)
            for kind, milliseconds in times.items():
                found.setdefault(kind, {})[name] = milliseconds
        return found


@dataclass(frozen=True)
class Ahead:
    """Built without the GPU by TensorRT for RTX: the builder's memory; latency from the profile.

    For an SM that it does not offer the nearest one is built as a check: the graph compiles, and memory is
    about that. That engine is not kept, and its figures stay estimates.
    """

    profile: DeviceProfile
    workload: Workload
    precision: str
    reason: str
    sm: int
    name: str = "tensorrt-rtx"
    builds: bool = True
    measures: bool = False

    def performance(self, candidate: Exported, dense: tuple[Exported, Performance] | None, tell: Tell) -> Performance:
        estimated = estimate_performance(candidate.decoder, self.profile, self.workload, self.precision)
        graph = candidate.graphs / GraphVariant(self.profile.dialect, "last").filename
        limit = workspace_bytes(candidate.decoder, self.profile, self.workload, self.precision)
        if self.sm == self.profile.sm:
            plan = _plan(candidate, self.profile)
            result = measure.build(Here(), "tensorrt-rtx", graph, plan, self.workload, tell, self.sm, limit)
            return self._with(estimated, result)
        try:
            with tempfile.TemporaryDirectory(dir=candidate.graphs.parent) as folder:
                plan = Path(folder) / "check.engine"
                result = measure.build(Here(), "tensorrt-rtx", graph, plan, self.workload, tell, self.sm, limit)
        except EngineError as error:  # no proof that the device's own TensorRT cannot: said, not fatal
            note = f"TensorRT for RTX could not compile the graph for SM {self.sm}, as a check: {error.message}"
            return replace(estimated, notes=(*estimated.notes, note))
        return self._with(estimated, result)

    def _with(self, estimated: Performance, result: BuildResult) -> Performance:
        own = self.sm == self.profile.sm
        basis = f"TensorRT for RTX {result.version}, SM {self.sm}, {result.effort}"
        if not own:
            basis += f": the nearest to SM {self.profile.sm} that it offers"

        def figure(value: float, what: str) -> Figure:
            kind = Built if own else Estimate
            return kind(float(value), "bytes", self.profile.name, f"{what}; {basis}")

        memory = replace(
            estimated.memory,
            weights=figure(result.weights_bytes, "the builder's total weights memory"),
            activations=figure(
                result.activation_bytes + result.scratch_bytes, "the builder's activation and scratch memory"
            ),
        )
        conditions = {"engine": basis}
        if not own:
            conditions = {"feasibility": f"{basis}; not shipped, the device builds its own engine"}
        notes = (*estimated.notes, *result.warnings)
        return replace(estimated, memory=memory, notes=notes, conditions=conditions)


@dataclass(frozen=True)
class Estimated:
    """No engine can be built here: memory and latency from the profile's figures."""

    profile: DeviceProfile
    workload: Workload
    precision: str
    reason: str
    name: str = "tensorrt"
    builds: bool = False
    measures: bool = False

    def performance(self, candidate: Exported, dense: tuple[Exported, Performance] | None, tell: Tell) -> Performance:
        return estimate_performance(candidate.decoder, self.profile, self.workload, self.precision)


def _plan(candidate: Exported, profile: DeviceProfile) -> Path:
    candidate.engine.mkdir(parents=True, exist_ok=True)
    return candidate.engine / f"model.sm{profile.sm}.engine"
