"""The check of a device, part by part, with a small model: from its Python to the memory that an engine takes.

The tasks run on the device through the sessions that measurements use, and what they return is judged here. It does
not know the command line; of the user's model it knows bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from edgeprune.dialects import LEAST_TENSORRT, is_in_place, version_of
from edgeprune.engine.checks import Check, Checks, NotApplicable
from edgeprune.engine.checkup_judges import (
    judge_cache,
    judge_capture,
    judge_clock,
    judge_gpu_memory,
    judge_heat,
    judge_power,
    judge_process_memory,
)
from edgeprune.engine.checkup_model import WORKLOAD, SmallModel, updates_in_place, write_small_model
from edgeprune.engine.checkup_room import Need, building_room, disk_room, memory_room
from edgeprune.engine.estimate import counted
from edgeprune.engine.onnx.ops import OPERATORS
from edgeprune.errors import BadAnswer, EngineError, Unreachable
from edgeprune.files import scratch_folder
from edgeprune.ondevice import measure
from edgeprune.ondevice.budget import format_bytes
from edgeprune.ondevice.figures import Workload
from edgeprune.ondevice.llama_tools import REMEDY, refusal_of, tool_of
from edgeprune.ondevice.measure import CHECK_SECONDS, Session
from edgeprune.ondevice.runtimes import LLAMA_CPP, RUNTIMES, preferred
from edgeprune.ondevice.tensorrt import BuildResult
from edgeprune.ondevice.worker import OnProgress, quiet
from edgeprune.precision import PRECISIONS, WEIGHT_FORMATS, WeightFormat
from edgeprune.profiles import PROCESSOR, DeviceProfile, OfferedFormats, list_profiles, load_profile, with_tensorrt

PROCESSORS_DIALECT = "onnxruntime"
GPU_DIALECTS = tuple(name for name in OPERATORS if name != PROCESSORS_DIALECT)
LONG = Workload(batch=1, prompt=WORKLOAD.prompt, context=4096)  # whose cache is most of a small model's memory
BOARD = "jetson-orin"  # a profile of a device with TensorRT
NAMED, NOT_DESCRIBED = "as named", "the device did not describe itself"


@dataclass(frozen=True)
class Checkup:
    """The outcome of all checks. where: the device in words; description: None where it gave none."""

    where: str
    profile: str
    engine: str
    description: dict[str, Any] | None
    checks: list[Check]
    seconds: float

    def count(self, state: str) -> int:
        """Returns the number of checks with that outcome."""
        return sum(check.state == state for check in self.checks)


def check_device(
    session: Session,
    where: str,
    is_remote: bool,
    profile: DeviceProfile | None,
    need_of: Callable[[DeviceProfile], Need] | None,
    on_progress: OnProgress,
) -> Checkup:
    """Checks a device; whatever fails is an outcome, and the rest is checked all the same.

    where: the device in words. profile: None for that which fits the GPU that is found, else for the processor's.
    need_of: returns what the user's model needs on a device; None for no model.
    """
    checks = Checks(session, on_progress)
    described: dict[str, Any] = {}

    def describe(limited: Session) -> str:
        try:
            described.update(measure.describe(limited, quiet))
        except (Unreachable, BadAnswer):
            checks.stop(NOT_DESCRIBED)
            raise
        return f"{described['machine']}, Python {described['python']}, {described['platform']}"

    checks.run("device", describe)
    device = _Device(checks, is_remote, *_profile_of(profile, described), described)
    with scratch_folder() as folder:
        device.check_all(folder, need_of)
    return Checkup(
        where, device.profile.name, device.engine, described or None, checks.outcomes, round(checks.seconds, 1)
    )


def _profile_of(named: DeviceProfile | None, described: dict[str, Any]) -> tuple[DeviceProfile, str]:
    """Returns the profile to check against, and why that one: of the SM of the GPU, with the nearest memory."""
    if named is not None:
        return named, NAMED
    gpu = described.get("gpu")
    if gpu is None and described.get("modules", {}).get("tensorrt"):
        return load_profile(BOARD), "which stands for any board with TensorRT, because no GPU is found"
    if gpu is None:
        return load_profile(PROCESSOR), "no GPU is found, and no device is named"
    same = [one for one in list_profiles() if one.sm == gpu["sm"]]
    if not same:
        return load_profile(PROCESSOR), f"no profile is of SM {gpu['sm']}: tools/probe_profile.py writes one"
    nearest = min(same, key=lambda one: (abs(one.memory.si - gpu["memory"]), len(one.name)))
    return nearest, f"of SM {gpu['sm']} with the nearest memory; --device names another"


@dataclass
class _Device:
    """The checks of one device in their order, and what later ones need of those before.

    how: the profile was chosen; built: by dialect and format, the small model, the engine's file and its figures.
    """

    checks: Checks
    is_remote: bool
    profile: DeviceProfile
    how: str
    described: dict[str, Any]
    built: dict[str, tuple[SmallModel, Path, BuildResult]] = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        """Returns whether the profile's engine runs on a GPU."""
        return RUNTIMES[self.profile.engine].on_gpu

    @property
    def engine(self) -> str:
        """Returns the engine that the device has for the profile, else the profile's own."""
        order = preferred(self.profile.engine) if self.on_gpu else [self.profile.engine]
        return next((name for name in order if self._version(RUNTIMES[name].module)), self.profile.engine)

    def _version(self, module: str) -> str | None:
        return self.described.get("modules", {}).get(module)

    def check_all(self, folder: Path, need_of: Callable[[DeviceProfile], Need] | None) -> None:
        """Runs every check. folder: for graphs and engines; need_of: as of check_device."""
        run = self.checks.run
        # Modules and GPU.
        run("profile", lambda _: self._chosen_profile())
        run("numpy", lambda _: self._module("numpy"))
        runs_graphs = self.profile.engine != LLAMA_CPP
        if runs_graphs:
            run(self.engine, lambda _: self._module(RUNTIMES[self.engine].module))
        run("GPU", lambda _: self._gpu())
        run(LLAMA_CPP, lambda _: self._llamacpp())
        # Engines, and what they are measured with.
        if runs_graphs:
            written = cache(lambda form: self._write(folder, form))
            for dialect, form in self._pairs():
                self._check_engine(folder, written, dialect, form)
            run("cache in place", lambda limited: self._cache(limited, written))
            run("graph capture", self._capture)
            run("clock", lambda limited: self._clock(limited, written))
            run("memory accounting", lambda limited: self._memory(limited, written))
        # The state of the machine, and its room.
        told: dict[str, Any] = {}

        def state(limited: Session) -> dict[str, Any]:
            """Asks once for what several checks look at."""
            told.update({} if told else self._ask(limited, "state", {}))
            return told

        run("power and clocks", lambda limited: judge_power(state(limited)["conditions"]))
        run("temperatures", lambda limited: judge_heat(state(limited)["conditions"]))
        need = cache(lambda: need_of(self.profile) if need_of else None)
        run("disk", lambda limited: disk_room(state(limited), self.profile, need()))
        run("memory", lambda limited: memory_room(state(limited), self.described, self.profile, need()))
        run("memory to build", lambda _: building_room(self.described, self.profile, need()))

    def _chosen_profile(self) -> str:
        """Takes the version of TensorRT that the device has instead of the one that the profile assumes."""
        self._need_description()
        version = self._version("tensorrt")
        if self.engine == "tensorrt" and self.profile.tensorrt is not None and version:
            self.profile = with_tensorrt(self.profile, version)
        return f"{self.profile.name}, {self.how}; engine {self.engine}, dialect {self.profile.dialect}"

    def _need_description(self) -> None:
        """Raises NotApplicable where the device did not describe itself."""
        if not self.described:
            raise NotApplicable(NOT_DESCRIBED)

    def _llamacpp(self) -> str:
        """Returns what can measure with llama.cpp.

        Raises EngineError where nothing can and the profile is of that engine; else NotApplicable, as it is no fault.
        """
        self._need_description()
        if (refusal := refusal_of(self.described, self.profile.sm)) is not None:
            raise EngineError(refusal, REMEDY) if self.profile.engine == LLAMA_CPP else NotApplicable(refusal)
        return " ".join(tool_of(self.described, self.profile.sm))

    def _module(self, name: str) -> str:
        """Returns the version of a module. Raises EngineError where it is missing, broken or too old."""
        self._need_description()
        runtime = next((one for one in RUNTIMES.values() if one.module == name), None)
        install = f"python3 -m pip install {name}"
        if runtime is not None:
            install = runtime.install_there if self.is_remote else runtime.install_here
        version = self._version(name)
        if version is None:
            raise EngineError(f"it cannot be imported: {self.described['missing'][name]}", f"Install it: {install}")
        if runtime is not None and _is_older(version, runtime.least):
            raise EngineError(
                f"{version} is older than {runtime.least}, the oldest that is known to work",
                f"Install {runtime.least} or newer: {install}",
            )
        return version

    def _gpu(self) -> str:
        """Returns the GPU in words. Raises EngineError where it is missing, or not the profile's."""
        self._need_description()
        gpu, why = self.described["gpu"], self.described["no_gpu"] or "it was not looked for, which takes numpy"
        if gpu is None and not self.on_gpu and not self._version("tensorrt"):
            raise NotApplicable(f"the processor is checked; {why}")
        if gpu is None:
            raise EngineError(
                why,
                "Check the driver (nvidia-smi; tegrastats on a Jetson), and install cuda-python there: pip install "
                "cuda-python",
            )
        if self.on_gpu and gpu["sm"] != self.profile.sm:
            raise EngineError(
                f"{gpu['name']} is of SM {gpu['sm']}, the profile {self.profile.name} of SM {self.profile.sm}",
                "Name the device that it is (`edgeprune devices` lists them), or leave --device out.",
            )
        return f"{gpu['name']}, SM {gpu['sm']}, {format_bytes(gpu['memory'])}, {gpu['layer']}, driver {gpu['driver']}"

    def _pairs(self) -> list[tuple[str, WeightFormat | None]]:
        """Returns the dialects and formats to build: all formats of the profile in its own dialect, two in others."""
        names = dict.fromkeys(name for offer in self.profile.weights.values() for name in offer.formats)
        pairs = [(self.profile.dialect, form) for form in (None, *(WEIGHT_FORMATS[name] for name in names))]
        others = [name for name in GPU_DIALECTS if self.on_gpu and name != self.profile.dialect]
        return pairs + [(dialect, form) for dialect in others for form in (None, WEIGHT_FORMATS["int8"])]

    def _offer(self, form: WeightFormat | None) -> OfferedFormats | None:
        """Returns the profile's offer of a format."""
        offers = self.profile.weights.values()
        return next((offer for offer in offers if form is not None and form.name in offer.formats), None)

    def _write(self, folder: Path, form: WeightFormat | None) -> SmallModel:
        """Writes the small model in a format, its table too where the profile offers that."""
        offer, dialects = self._offer(form), GPU_DIALECTS if self.on_gpu else (PROCESSORS_DIALECT,)
        place = folder / (form.name if form else "float")
        return write_small_model(
            place, self.profile.precision, dialects, form, form if offer and offer.tables else None
        )

    def _check_engine(
        self, folder: Path, written: Callable[[Any], SmallModel], dialect: str, form: WeightFormat | None
    ) -> None:
        """Checks the build in a dialect and a format, and its logits; ONNX Runtime takes the graph itself."""
        name = f"{dialect} {form.name if form else 'float'}"
        plan = folder / f"{name.replace(' ', '.')}.engine"
        if self.on_gpu:
            self.checks.run(f"build {name}", lambda limited: self._build(limited, written, name, dialect, form, plan))
        self.checks.run(f"logits {name}", lambda limited: self._logits(limited, written, name, form))

    def _need_modules(self) -> None:
        """Raises NotApplicable where the engine's module or numpy is missing."""
        self._need_description()
        if missing := [name for name in ("numpy", RUNTIMES[self.engine].module) if self._version(name) is None]:
            raise NotApplicable(f"it needs {' and '.join(missing)}")

    def _build(
        self,
        limited: Session,
        written: Callable[[Any], SmallModel],
        name: str,
        dialect: str,
        form: WeightFormat | None,
        plan: Path,
    ) -> str:
        """Builds an engine. Raises EngineError; NotApplicable where this device's engine does not know such graphs."""
        self._need_modules()
        version, offer, gpu = self._version(RUNTIMES[self.engine].module), self._offer(form), self.described["gpu"]
        if self.engine == "tensorrt":
            if gpu is None:
                raise NotApplicable("there is no GPU, and TensorRT builds for that of its own machine alone")
            if dialect != "primitive" and not is_in_place(version):
                raise NotApplicable(
                    f"the parser of TensorRT {version} does not know {dialect}, which takes {LEAST_TENSORRT}"
                )
            if offer is not None and offer.tensorrt is not None and _is_older(version, offer.tensorrt):
                raise NotApplicable(f"TensorRT {version} does not run {form.name}, which takes {offer.tensorrt}")
        model = written(form)
        sm = None if gpu is not None else self.profile.sm
        result = measure.build(limited, self.engine, model.graphs[dialect], plan, WORKLOAD, quiet, sm)
        self.built[name] = (model, plan, result)
        ahead = "" if sm is None else f", for SM {sm} without the GPU"
        return f"{format_bytes(result.weights_bytes)} of weights, {result.effort}{ahead}"

    def _logits(
        self, limited: Session, written: Callable[[Any], SmallModel], name: str, form: WeightFormat | None
    ) -> str:
        """Compares the logits of an engine, or of a graph in ONNX Runtime, with the reference. Raises EngineError."""
        if self.on_gpu:
            model, plan, _ = self._running(name)
            files = {"plan": str(plan), "reference": str(model.reference)}
        else:
            self._need_modules()
            model = written(form)
            files = {"graph": str(model.graphs[PROCESSORS_DIALECT]), "reference": str(model.reference)}
        words = measure.check_logits(limited, self.engine, files, self.profile.precision, name, quiet)
        return "; ".join(words.values())

    def _running(self, name: str | None = None) -> tuple[SmallModel, Path, BuildResult]:
        """Returns an engine that can run: the named one, else the first. Raises NotApplicable where there is none."""
        self._need_description()
        built = self.built.get(name) if name else next(iter(self.built.values()), None)
        if built is None:
            raise NotApplicable("its engine was not built" if name else "no engine was built")
        if self.described["gpu"] is None:
            raise NotApplicable("there is no GPU to run the engine")
        return built

    def _ask(self, limited: Session, step: str, files: dict[str, Path]) -> dict[str, Any]:
        """Returns the answer of a task of ondevice/checkup.py. Raises EngineError."""
        request = {
            "task": f"the check of the {step}",
            "do": "checkup",
            "step": step,
            "engine": self.engine,
            "files": {role: str(path) for role, path in files.items()},
        }
        return limited.run(request, CHECK_SECONDS, quiet)

    def _cache(self, limited: Session, written: Callable[[Any], SmallModel]) -> str:
        if self.on_gpu:
            return self._cache_of_engines()
        self._need_modules()
        return judge_cache(self._ask(limited, "cache", {"graph": written(None).graphs[PROCESSORS_DIALECT]}))

    def _cache_of_engines(self) -> str:
        """Returns which engines update their cache in place; their logits after several steps are the proof.

        Raises NotApplicable where there is none, EngineError where its logits are not the reference's.
        """
        names = [name for name, (model, _, _) in self.built.items() if updates_in_place(model.graphs[name.split()[0]])]
        if not names:
            raise NotApplicable("no dialect that was built updates it: past and present are two buffers")
        self._running(names[0])
        logits = next(check for check in self.checks.outcomes if check.name == f"logits {names[0]}")
        if logits.state != "passed":
            raise EngineError(f"after several steps in place: {logits.detail}", logits.remedy)
        return f"{names[0]}: one buffer is past and present, and the logits after several steps are right"

    def _capture(self, limited: Session) -> str:
        if not self.on_gpu:
            raise NotApplicable("ONNX Runtime on a processor launches nothing")
        _, plan, _ = self._running()
        if self.described["gpu"]["layer"].startswith("pycuda"):
            raise NotApplicable("pycuda has no CUDA graphs: with cuda-python a small model's decode may be faster")
        answer = self._ask(limited, "capture", {"plan": plan})
        return judge_capture(answer, PRECISIONS[self.profile.precision].tolerance[1])

    def _clock(self, limited: Session, written: Callable[[Any], SmallModel]) -> str:
        if self.on_gpu:
            return judge_clock(self._ask(limited, "clock", {"plan": self._running()[1]}))
        self._need_modules()
        return judge_clock(self._ask(limited, "clock", {"graph": written(None).graphs[PROCESSORS_DIALECT]}))

    def _memory(self, limited: Session, written: Callable[[Any], SmallModel]) -> str:
        if self.on_gpu:
            _, plan, result = self._running()
            answer = self._ask(limited, "memory", {"plan": plan})
            return judge_gpu_memory(answer, result.weights_bytes, self.profile.runtime_memory.si)
        self._need_modules()
        model = written(None)
        graph, known = model.graphs[PROCESSORS_DIALECT], counted(model.decoder, self.profile.precision, LONG)
        process = measure.process_memory(limited, "onnxruntime", graph, LONG, quiet)
        return judge_process_memory(process, known.weights + known.cache + known.buffers)


def _is_older(version: str, least: str) -> bool:
    return version_of(version) < version_of(least)
