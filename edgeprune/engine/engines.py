"""The engines that build and measure candidates, behind one small interface.

They do not know the budget, nor which candidates there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from edgeprune.engine.answers import ThisMachine
from edgeprune.engine.build_memory import BuildMemory, build_limit, build_memory, note_of_build
from edgeprune.engine.estimate import counted, estimate_performance, workspace_bytes
from edgeprune.engine.onnx.data import largest_matrix_bytes
from edgeprune.engine.onnx.graph import GraphVariant, graph_weight_bytes, write_graphs
from edgeprune.errors import EngineError
from edgeprune.files import scratch_folder
from edgeprune.model.decoder import Decoder
from edgeprune.ondevice import machine, measure
from edgeprune.ondevice.budget import format_bytes
from edgeprune.ondevice.build_room import build_room, check_build, workspace_within
from edgeprune.ondevice.durations import timing
from edgeprune.ondevice.figures import Built, Estimate, Figure, Performance, Workload
from edgeprune.ondevice.measure import Session
from edgeprune.ondevice.onnxruntime import GRAPH_FILE
from edgeprune.ondevice.tensorrt import BuildResult, holds_copies
from edgeprune.ondevice.worker import OnProgress
from edgeprune.precision import PRECISIONS, GraphPrecision
from edgeprune.profiles import DeviceProfile


@dataclass(frozen=True)
class Exported:
    """A model on disk.

    graphs: the folder of its graph variants; engine: the folder for what is built of them; reference: the file of the
    logits that an engine is checked against.
    """

    decoder: Decoder
    graphs: Path
    engine: Path
    reference: Path


class Engine(Protocol):
    """Something that gives the performance of a candidate.

    name: in runtimes.py; reason: why it was chosen.
    """

    name: str
    reason: str
    builds: bool  # whether a performance needs the exported graphs; an estimate needs the Decoder alone
    measures: bool  # whether latencies are measured
    compiles: bool  # whether a builder of its own chooses how weights are held
    one_width: bool  # whether it runs only models whose layers are alike

    def performance(
        self, candidate: Exported, dense: tuple[Exported, Performance] | None, on_progress: OnProgress
    ) -> Performance:
        """Returns memory and latency of a candidate; dense: the dense model with its own, None for itself."""


class Compiling(Engine, Protocol):
    """An engine whose builder chooses how weights are held, in the graph's formats or in copies."""

    def context_bytes(self, model: Exported, workload: Workload, on_progress: OnProgress) -> float | None:
        """Returns the activations and scratch memory of a model's engine; None where a build that is only a check
        fails. Raises EngineError."""

    def check_build(self, decoder: Decoder) -> None:
        """Raises EngineError where a model's engine cannot be built for lack of memory."""


class Measuring(Engine, Protocol):
    """An engine that measures latencies."""

    def identity(self, on_progress: OnProgress) -> dict[str, Any]:
        """Returns the device and the engine's version, for which a latency holds."""

    def write(self, decoder: Decoder, weights: Mapping[str, Any], folder: Path) -> None:
        """Writes what `latencies` needs of a model into a folder, which is that of its graphs and of its engine."""

    def latencies(self, models: dict[str, Exported], on_progress: OnProgress) -> dict[str, dict[str, float]]:
        """Returns prefill and decode of several models by kind and name, all on one scale. Raises EngineError."""


@dataclass(frozen=True)
class OnnxRuntime:
    """ONNX Runtime on a processor, which measures candidates interleaved with the dense model."""

    profile: DeviceProfile
    workload: Workload
    precision: str
    reason: str
    session: Session = ThisMachine()
    name: str = "onnxruntime"
    builds: bool = True
    measures: bool = True
    compiles: bool = False
    one_width: bool = False

    def performance(
        self, candidate: Exported, dense: tuple[Exported, Performance] | None, on_progress: OnProgress
    ) -> Performance:
        """Returns the measured performance of a candidate; raises EngineError where its logits are wrong."""
        measured = measure.in_process(
            self.session,
            self.name,
            None if dense is None else dense[0].graphs / GRAPH_FILE,
            candidate.graphs / GRAPH_FILE,
            self.workload,
            counted(candidate.decoder, self.precision, self.workload),
            on_progress,
            candidate.reference,
            self.precision,
        )
        return measured if dense is None else normalised(measured, dense[1])

    def identity(self, on_progress: OnProgress) -> dict[str, Any]:
        """Returns the processor and the version of ONNX Runtime."""
        description = measure.describe(self.session, on_progress)
        return {"processor": description["processor"], "onnxruntime": description["modules"]["onnxruntime"]}

    def write(self, decoder: Decoder, weights: Mapping[str, Any], folder: Path) -> None:
        """Writes the graph of a model."""
        _write_graph(decoder, weights, folder, self.profile, self.precision, self.workload)

    def latencies(self, models: dict[str, Exported], on_progress: OnProgress) -> dict[str, dict[str, float]]:
        """Returns the latencies of several models, measured in turns."""
        graphs = {name: model.graphs / GRAPH_FILE for name, model in models.items()}
        seconds = timing().survey_seconds * len(models)
        return measure.relative_latencies(self.session, self.name, graphs, self.workload, seconds, on_progress)


@dataclass(frozen=True)
class TensorRT:
    """TensorRT on the GPU itself, of this machine or behind a session, which builds, checks and measures candidates.

    state: the device's memory when it was chosen, as machine.memory_state tells it; empty where it is unknown. where:
    the device in words.
    """

    profile: DeviceProfile
    workload: Workload
    precision: str
    reason: str
    name: str
    session: Session = ThisMachine()
    state: dict[str, int] = field(default_factory=dict)
    where: str = "this machine"
    builds: bool = True
    measures: bool = True
    compiles: bool = True
    one_width: bool = False

    def performance(
        self, candidate: Exported, dense: tuple[Exported, Performance] | None, on_progress: OnProgress
    ) -> Performance:
        """Returns the measured performance of a candidate; raises EngineError where it fails or is wrong."""
        plan, built = self._built(candidate, self.workload, on_progress)
        runtime = estimate_performance(candidate.decoder, self.profile, self.workload, self.precision).memory.runtime
        measured = measure.on_tensorrt(
            self.session,
            self.name,
            plan,
            built,
            self.workload,
            runtime,
            candidate.reference,
            self.precision,
            on_progress,
        )
        if dense is None:
            return measured
        # The runtime's memory is the same for both models: what other programs took meanwhile must not decide.
        measured = replace(measured, memory=replace(measured.memory, runtime=dense[1].memory.runtime))
        return _with_note_of_copies(measured, candidate, dense, self.workload, self.precision)

    def context_bytes(self, model: Exported, workload: Workload, on_progress: OnProgress) -> float | None:
        """Returns the activations and scratch memory of a model's engine. Raises EngineError."""
        return self._built(model, workload, on_progress)[1].context_bytes

    def identity(self, on_progress: OnProgress) -> dict[str, Any]:
        """Returns the machine, its GPU, and the engine with its version."""
        description = measure.describe(self.session, on_progress)
        version = description["modules"][self.name.replace("-", "_")]
        return {
            "machine": description["machine"],
            "gpu": description["gpu"]["name"],
            "engine": self.name,
            "version": version,
        }

    def write(self, decoder: Decoder, weights: Mapping[str, Any], folder: Path) -> None:
        """Writes the graph of a model."""
        _write_graph(decoder, weights, folder, self.profile, self.precision, self.workload)

    def latencies(self, models: dict[str, Exported], on_progress: OnProgress) -> dict[str, dict[str, float]]:
        """Returns the latencies of several models in ms, built and measured one after the other."""
        latencies: dict[str, dict[str, float]] = {}
        for name, model in models.items():
            plan, _ = self._built(model, self.workload, on_progress)
            seconds = 2 * timing().survey_seconds
            times = measure.engine_latencies(self.session, self.name, plan, self.workload, seconds, on_progress)
            for kind, milliseconds in times.items():
                latencies.setdefault(kind, {})[name] = milliseconds
        return latencies

    def check_build(self, decoder: Decoder) -> None:
        """Raises EngineError where building a model's engine takes more memory than the device has for it."""
        self._need(decoder, self.workload)

    def _need(self, decoder: Decoder, workload: Workload) -> tuple[BuildMemory, int | None]:
        """Returns the memory that a build needs, and the device's room for it. Raises EngineError for too little."""
        need = build_memory(decoder, self.profile, workload, self.precision)
        room = build_room(self.state, build_limit(self.profile))
        check_build(need.total, room, self.where, _engine_of(decoder, self.profile, workload, self.precision))
        return need, room

    def _built(self, model: Exported, workload: Workload, on_progress: OnProgress) -> tuple[Path, BuildResult]:
        """Returns the file of a model's engine, which it builds, and the builder's figures. Raises EngineError."""
        need, room = self._need(model.decoder, workload)
        graph, plan = _graph(model, self.profile), _plan(model, self.profile)
        workspace = workspace_bytes(model.decoder, self.profile, workload, self.precision)
        if self.profile.memory_shared_with_system:
            workspace = workspace_within(workspace, need.total, room)
        return plan, measure.build(
            self.session, self.name, graph, plan, workload, on_progress, workspace_bytes=workspace
        )


@dataclass(frozen=True)
class BuiltAhead:
    """TensorRT for RTX without the GPU: it builds engines, reports their memory, and latency is estimated.

    For an SM that it does not offer, the engine of the nearest SM is built as a check that the graph compiles. That
    engine is not kept, and its memory counts as an estimate.
    """

    profile: DeviceProfile
    workload: Workload
    precision: str
    reason: str
    sm: int
    name: str = "tensorrt-rtx"
    builds: bool = True
    measures: bool = False
    compiles: bool = True
    one_width: bool = False

    def performance(
        self, candidate: Exported, dense: tuple[Exported, Performance] | None, on_progress: OnProgress
    ) -> Performance:
        """Returns the estimated performance of a candidate, with the memory of its engine where that can be built."""
        setting = (self.profile, self.workload, self.precision)
        estimated = _with_note_of_build(estimate_performance(candidate.decoder, *setting), candidate.decoder, *setting)
        try:
            result = self._built(candidate, self.workload, on_progress)
        except EngineError as error:
            if self._is_own:
                raise
            # A note only: the device's own TensorRT may compile it.
            note = f"TensorRT for RTX could not compile the graph for SM {self.sm}, as a check: {error.message}"
            return replace(estimated, notes=(*estimated.notes, note))
        return _with_note_of_copies(self._with(estimated, result), candidate, dense, self.workload, self.precision)

    def context_bytes(self, model: Exported, workload: Workload, on_progress: OnProgress) -> float | None:
        """Returns the activations and scratch memory of a model's engine; None where the nearest SM's cannot be built.

        Raises EngineError where the device's own cannot.
        """
        try:
            return self._built(model, workload, on_progress).context_bytes
        except EngineError:
            if self._is_own:
                raise
            return None

    def check_build(self, decoder: Decoder) -> None:
        """Raises EngineError where this machine has too little memory to build the device's own engine."""
        if self._is_own:
            self._check(decoder, self.workload)

    def _check(self, decoder: Decoder, workload: Workload) -> None:
        """Raises EngineError where this machine has too little memory to build a model's engine."""
        need = build_memory(decoder, self.profile, workload, self.precision)
        what = _engine_of(decoder, self.profile, workload, self.precision)
        check_build(need.host, build_room(machine.memory_state()), "this machine", what)

    @property
    def _is_own(self) -> bool:
        """Returns whether the engine is built for the device's own SM."""
        return self.sm == self.profile.sm

    def _built(self, model: Exported, workload: Workload, on_progress: OnProgress) -> BuildResult:
        """Returns the builder's figures of a model's engine, which is kept where it is the device's own.

        Raises EngineError.
        """
        self._check(model.decoder, workload)
        graph = _graph(model, self.profile)
        workspace = workspace_bytes(model.decoder, self.profile, workload, self.precision)
        with scratch_folder(model.graphs.parent, "check-") as folder:
            plan = _plan(model, self.profile) if self._is_own else folder / "check.engine"
            return measure.build(ThisMachine(), "tensorrt-rtx", graph, plan, workload, on_progress, self.sm, workspace)

    def _with(self, estimated: Performance, result: BuildResult) -> Performance:
        """Returns an estimate with the memory of a built engine."""
        # Name the source of the figures.
        own = self._is_own
        basis = f"TensorRT for RTX {result.version}, SM {self.sm}, {result.effort}"
        if not own:
            basis += f": the nearest to SM {self.profile.sm} that it offers"

        def figure(value: float, what: str) -> Figure:
            kind = Built if own else Estimate
            return kind(float(value), "bytes", self.profile.name, f"{what}; {basis}")

        # Replace weights and activations.
        memory = replace(
            estimated.memory,
            weights=figure(result.weights_bytes, "the builder's total weights memory"),
            activations=figure(result.context_bytes, "the builder's activation and scratch memory"),
        )
        conditions = {"engine": basis}
        if not own:
            conditions = {"feasibility": f"{basis}; not in the bundle, the device builds its own engine"}
        # What the builder stores twice concerns the engine that is shipped; another SM's is only a check.
        notes = (*estimated.notes, *(result.warnings if own or not result.weights_bytes else ()))
        return replace(estimated, memory=memory, notes=notes, conditions=conditions)


@dataclass(frozen=True)
class Estimated:
    """The estimator, where no engine can be built: memory and latency come from the profile's figures."""

    profile: DeviceProfile
    workload: Workload
    precision: str
    reason: str
    name: str = "tensorrt"
    builds: bool = False
    measures: bool = False
    compiles: bool = False
    one_width: bool = False

    def performance(
        self, candidate: Exported, dense: tuple[Exported, Performance] | None, on_progress: OnProgress
    ) -> Performance:
        """Returns the estimated performance of a candidate."""
        setting = (self.profile, self.workload, self.precision)
        return _with_note_of_build(estimate_performance(candidate.decoder, *setting), candidate.decoder, *setting)


def normalised(measured: Performance, dense: Performance) -> Performance:
    """Returns what was measured of a candidate, as its ratios of the dense model's own figures.

    So a candidate does not seem slow on a machine that is busier than it was.
    """
    return replace(
        measured,
        prefill=measure.scaled(measured.prefill_ratio, dense.prefill),
        decode=measure.scaled(measured.decode_ratio, dense.decode),
    )


def dequantises(
    context_bytes: float, float_context_bytes: float, decoder: Decoder, workload: Workload, precision: GraphPrecision
) -> bool:
    """Returns whether an engine's builder dequantised the weights of a Decoder with formats into copies.

    context_bytes: of its engine; float_context_bytes: of one in floats, of the same widths or larger ones.
    """
    stream = workload.batch * workload.prompt * decoder.hidden_size * PRECISIONS[precision].element_bytes
    return holds_copies(context_bytes, float_context_bytes, largest_matrix_bytes(decoder, precision), stream)


def _with_note_of_copies(
    performance: Performance,
    candidate: Exported,
    dense: tuple[Exported, Performance] | None,
    workload: Workload,
    precision: GraphPrecision,
) -> Performance:
    """Returns a performance that notes where the engine's builder dequantised the candidate's weights, and which."""
    if dense is None or dense[0].decoder.weight_formats:
        return performance
    own, plain = performance.memory.activations.value, dense[1].memory.activations.value
    if not dequantises(own, plain, candidate.decoder, workload, precision):
        return performance
    names = dict.fromkeys(form.name for form in candidate.decoder.weight_formats.values())
    note = (
        f"the engine dequantises {' or '.join(names)} into copies at each step: it needs {own / 2**20:.0f} MiB of "
        f"activations, the dense model {plain / 2**20:.0f} MiB. Its latency is not what the format promises"
    )
    return replace(performance, notes=(*performance.notes, note))


def _with_note_of_build(
    performance: Performance, decoder: Decoder, profile: DeviceProfile, workload: Workload, precision: GraphPrecision
) -> Performance:
    """Returns a performance that notes where the device may have too little memory to build the engine."""
    note = note_of_build(decoder, profile, workload, precision)
    return performance if note is None else replace(performance, notes=(*performance.notes, note))


def _engine_of(decoder: Decoder, profile: DeviceProfile, workload: Workload, precision: GraphPrecision) -> str:
    """Returns an engine in words, by the bytes of its weights."""
    weights = graph_weight_bytes(decoder, precision, profile.for_cache(decoder.cache_format).dialect, workload.context)
    return f"the engine of {format_bytes(weights)} of weights"


def _write_graph(
    decoder: Decoder,
    weights: Mapping[str, Any],
    folder: Path,
    profile: DeviceProfile,
    precision: GraphPrecision,
    workload: Workload,
) -> None:
    """Writes the graph of a model that the device's engine takes."""
    variant = GraphVariant(profile.for_cache(decoder.cache_format).dialect, "last")
    write_graphs(decoder, weights, folder, precision, [variant], workload.context)


def _graph(candidate: Exported, profile: DeviceProfile) -> Path:
    """Returns the graph of a candidate that the device's engine is built from."""
    return candidate.graphs / GraphVariant(profile.for_cache(candidate.decoder.cache_format).dialect, "last").filename


def _plan(candidate: Exported, profile: DeviceProfile) -> Path:
    """Returns the file of a candidate's engine for the profile's SM, in a folder that then exists."""
    candidate.engine.mkdir(parents=True, exist_ok=True)
    return candidate.engine / f"model.sm{profile.sm}.engine"
