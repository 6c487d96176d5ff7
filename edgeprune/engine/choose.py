"""Which engine builds and measures for a device, where, and why; each one behind the same small interface."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from edgeprune.ondevice import measure as perform, tensorrt
from edgeprune.ondevice.figures import Built, Estimate, Figure, Performance, Workload
from edgeprune.ondevice.worker import Tell, quiet
from edgeprune.engine.estimate import buffer_bytes, cache_bytes, estimate_performance
from edgeprune.engine.onnx.graph import Spelling, graph_weight_bytes
from edgeprune.ondevice.measure import Counted, Here, Session
from edgeprune.ondevice.tensorrt import BuildResult
from edgeprune.errors import EngineError, InputError
from edgeprune.model.decoder import Decoder
from edgeprune.profiles import DeviceProfile

RUNTIME_GRAPH = Spelling("onnxruntime", "last").filename
SURVEY_SECONDS = 3.0  # at most, for each of many models, prefill and decode together
NAMES = ("auto", "tensorrt", "tensorrt-rtx", "onnxruntime")


@dataclass(frozen=True)
class Exported:
    """A model on disk: `graphs` holds the spellings, `engine` takes what a build gives, `reference` its logits."""

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
        measured = perform.on_onnxruntime(
            self.session, None if dense is None else dense[0].graphs / RUNTIME_GRAPH, candidate.graphs / RUNTIME_GRAPH,
            self.workload, counted(candidate.decoder, self.precision, self.workload), tell, candidate.reference,
            self.precision,
        )  # fmt: skip
        if dense is None:
            return measured
        # Normalised by the dense model's own figure, so that a busy machine does not pass for a slow candidate.
        return replace(
            measured,
            prefill=perform.scaled(measured.prefill_ratio, dense[1].prefill),
            decode=perform.scaled(measured.decode_ratio, dense[1].decode),
        )

    def identity(self, tell: Tell) -> dict[str, Any]:
        found = perform.describe(self.session, tell)
        return {"processor": found["processor"], "onnxruntime": found["modules"]["onnxruntime"]}

    def latencies(self, models: dict[str, Exported], tell: Tell) -> dict[str, dict[str, float]]:
        graphs = {name: model.graphs / RUNTIME_GRAPH for name, model in models.items()}
        return perform.relative_latencies(self.session, graphs, self.workload, SURVEY_SECONDS * len(models), tell)


def counted(decoder: Decoder, precision: str, workload: Workload) -> Counted:
    """The bytes that ONNX Runtime's graph holds, its cache updated in place."""
    return Counted(
        weights=graph_weight_bytes(decoder, precision, "onnxruntime", workload.context),
        cache=cache_bytes(decoder, precision, workload, in_place=True),
        buffers=buffer_bytes(decoder, precision, workload, "onnxruntime"),
    )


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
        graph = candidate.graphs / Spelling(self.profile.dialect, "last").filename
        plan = _plan(candidate, self.profile)
        built = perform.build(
            self.session, self.name, graph, plan, self.workload, tell,
            workspace_bytes=workspace_bytes(candidate.decoder, self.profile, self.workload, self.precision),
        )  # fmt: skip
        runtime = estimate_performance(candidate.decoder, self.profile, self.workload, self.precision).memory.runtime
        found = perform.on_tensorrt(
            self.session, self.name, plan, built, self.workload, runtime, candidate.reference, self.precision, tell
        )
        if dense is None:
            return found
        # The runtime's part is the same for both; what other programs did meanwhile must not decide on a candidate.
        return replace(found, memory=replace(found.memory, runtime=dense[1].memory.runtime))

    def identity(self, tell: Tell) -> dict[str, Any]:
        found = perform.describe(self.session, tell)
        version = found["modules"][self.name.replace("-", "_")]
        return {"machine": found["machine"], "gpu": found["gpu"]["name"], "engine": self.name, "version": version}

    def latencies(self, models: dict[str, Exported], tell: Tell) -> dict[str, dict[str, float]]:
        found: dict[str, dict[str, float]] = {}
        for name, model in models.items():
            graph, plan = model.graphs / Spelling(self.profile.dialect, "last").filename, _plan(model, self.profile)
            workspace = workspace_bytes(model.decoder, self.profile, self.workload, self.precision)
            perform.build(self.session, self.name, graph, plan, self.workload, tell, workspace_bytes=workspace)
            seconds = 2 * SURVEY_SECONDS
            times = perform.engine_latencies(self.session, self.name, plan, self.workload, seconds, tell)
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
        graph = candidate.graphs / Spelling(self.profile.dialect, "last").filename
        limit = workspace_bytes(candidate.decoder, self.profile, self.workload, self.precision)
        if self.sm == self.profile.sm:
            plan = _plan(candidate, self.profile)
            result = perform.build(Here(), "tensorrt-rtx", graph, plan, self.workload, tell, self.sm, limit)
            return self._with(estimated, result)
        try:
            with tempfile.TemporaryDirectory(dir=candidate.graphs.parent) as folder:
                plan = Path(folder) / "check.engine"
                result = perform.build(Here(), "tensorrt-rtx", graph, plan, self.workload, tell, self.sm, limit)
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


def workspace_bytes(decoder: Decoder, profile: DeviceProfile, workload: Workload, precision: str) -> int:
    """Scratch memory that the profile leaves for one kernel: what is usable less weights and cache."""
    memory = estimate_performance(decoder, profile, workload, precision).memory
    return max(64 * 2**20, int(profile.usable_bytes - memory.weights.value - memory.cache.value))


def choose_engine(
    asked: str, profile: DeviceProfile, workload: Workload, precision: str, target: Session | None = None
) -> Engine:
    """The engine for a device, with the reason.

    asked: `auto` or an engine's name; target: a device to build and measure on. Raises InputError where the
    asked one cannot serve the device or is not installed, or the target is another device than the profile's;
    EngineError where the target does not answer or misses a module.
    """
    if asked not in NAMES:
        raise InputError(f"unknown engine {asked!r}", f"Engines are: {', '.join(NAMES)}.")
    gpus = ("tensorrt", "tensorrt-rtx")
    if asked not in ("auto", profile.engine) and not (target and {asked, profile.engine} <= set(gpus)):
        raise InputError(
            f"{profile.name} runs {profile.engine}, not {asked}",
            f"Leave --engine out, or choose a device of {asked} (`edgeprune devices`).",
        )
    parts = (profile, workload, precision)
    if target is not None:
        return _on_target(asked, parts, target)
    if profile.engine == "onnxruntime":
        return OnnxRuntime(*parts, reason="the device is this machine's processor")
    available, why = tensorrt.available(profile.engine)
    if asked != "auto" and not available:
        extra = "rtx" if asked == "tensorrt-rtx" else "tensorrt"
        raise InputError(
            f"the engine {asked} is not usable here: {why}",
            f'Install it with `pip install "edgeprune[{extra}]"`, or leave --engine out to estimate.',
        )
    if available and (gpu := perform.describe(Here(), quiet)["gpu"]) and gpu["sm"] == profile.sm:
        return TensorRT(*parts, reason=f"this machine has a {gpu['name']} and {why}", name=profile.engine)
    return _without_gpu(parts, available, why)


def _without_gpu(parts: tuple[DeviceProfile, Workload, str], available: bool, why: str) -> Engine:
    profile = parts[0]
    if profile.engine == "tensorrt-rtx" and not available:
        return Estimated(*parts, reason=f"nothing could be built: {why}", name="tensorrt-rtx")
    if profile.engine == "tensorrt-rtx":
        reason = f"TensorRT for RTX builds for SM {profile.sm} without the GPU; nothing ran on it"
        return Ahead(*parts, reason=reason, sm=profile.sm)
    reason = (
        f"engines for SM {profile.sm} are built on the device itself, which is not reachable from here "
        "(--target ssh://USER@DEVICE reaches it): latency and memory are estimates"
    )
    if tensorrt.available("tensorrt-rtx")[0]:
        nearest = min(tensorrt.offered_sms(), key=lambda sm: abs(sm - profile.sm))
        reason += f"; TensorRT for RTX checks that the graph compiles for SM {nearest}"
        return Ahead(*parts, reason=reason, sm=nearest, name="tensorrt")
    return Estimated(*parts, reason=reason)


def _on_target(asked: str, parts: tuple[DeviceProfile, Workload, str], target: Session) -> Engine:
    """What the device has decides; what it misses is told with the command that installs it there."""
    profile = parts[0]
    found = perform.describe(target, quiet)
    if found["modules"]["numpy"] is None:
        raise EngineError(f"{target} has no numpy", "Install it there: python3 -m pip install numpy")
    if profile.engine == "onnxruntime":
        _require(target, found, "onnxruntime")
        reason = f"{target} is a {found['processor']} with onnxruntime {found['modules']['onnxruntime']}"
        return OnnxRuntime(*parts, reason=reason, session=target)
    modules = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
    wanted = [asked] if asked != "auto" else [profile.engine, *(m for m in modules if m != profile.engine)]
    flavour = next((name for name in wanted if found["modules"][modules[name]]), None)
    if flavour is None:
        _require(target, found, modules[wanted[0]])
    gpu = found["gpu"]
    if gpu is None:
        raise EngineError(f"{target}: {found['no_gpu']}", "Install cuda-python or pycuda there, and check the driver.")
    if gpu["sm"] != profile.sm:
        raise InputError(
            f"{target} has a {gpu['name']} of SM {gpu['sm']}, the profile {profile.name} is for SM {profile.sm}",
            f"Give the profile of that device, or write one: python tools/probe_profile.py --target {target} "
            "--output device.toml",
        )
    version = found["modules"][modules[flavour]]
    reason = f"{target} is a {found['machine']} with {gpu['name']}, {flavour} {version} and {gpu['layer']}"
    return TensorRT(*parts, reason=reason, name=flavour, session=target)


def _require(target: Session, found: dict[str, Any], module: str) -> None:
    if found["modules"][module] is None:
        how = "it comes with JetPack (sudo apt install tensorrt python3-libnvinfer)" if module == "tensorrt" else ""
        raise EngineError(
            f"{target} has no Python module {module}",
            f"Install it there: {how or 'python3 -m pip install ' + module.replace('_', '-')}.",
        )
