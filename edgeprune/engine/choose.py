"""The choice of the engine that builds and measures for a device, of the place where it runs, and the reason.

It does not know models, nor how an engine works.
"""

from __future__ import annotations

from typing import Any

from edgeprune.engine.answers import ThisMachine
from edgeprune.engine.engines import BuiltAhead, Engine, Estimated, OnnxRuntime, TensorRT
from edgeprune.engine.llamacpp import LlamaCpp
from edgeprune.errors import EngineError, InputError
from edgeprune.ondevice import llama_tools, measure, tensorrt
from edgeprune.ondevice.figures import Workload
from edgeprune.ondevice.measure import Session
from edgeprune.ondevice.runtimes import GPU_RUNTIMES, LLAMA_CPP, RUNTIMES, preferred
from edgeprune.ondevice.worker import quiet
from edgeprune.profiles import DeviceProfile, in_precision, with_tensorrt

NAMES = ("auto", *RUNTIMES)


def choose_engine(
    asked: str,
    profile: DeviceProfile,
    workload: Workload,
    precision: str,
    target: Session | None = None,
    is_version_asked: bool = False,
) -> Engine:
    """Picks the engine for a device, with the reason.

    asked: `auto` or an engine's name; target: a device to build and measure on, whose version of TensorRT then counts
    unless is_version_asked. The engine has the profile for that version. Raises InputError where the asked
    engine cannot serve the device or is not installed, or where the target is another device than the profile's;
    EngineError where the target does not answer or lacks a module.
    """
    check_engine(asked, profile, target is not None)
    # On the target, or on this machine: its processor, its GPU, or an engine without a GPU.
    setting = (profile, workload, precision)
    if profile.engine == LLAMA_CPP:
        return _llamacpp(setting, target)
    if target is not None:
        return _on_target(asked, setting, target, is_version_asked)
    if profile.engine == "onnxruntime":
        return OnnxRuntime(*setting, reason="the device is this machine's processor")
    available, why = tensorrt.available(profile.engine)
    if asked != "auto" and not available:
        raise InputError(
            f"the engine {asked} is not usable here: {why}",
            f"Install it with `{RUNTIMES[asked].install_here}`, or leave --engine out to estimate.",
        )
    described = measure.describe(ThisMachine(), quiet) if available else {"gpu": None}
    if (gpu := described["gpu"]) and gpu["sm"] == profile.sm:
        version = described["modules"][RUNTIMES[profile.engine].module]
        reason = f"this machine has a {gpu['name']} and {why}"
        setting = _reported(setting, profile.engine, version, is_version_asked)
        return TensorRT(*setting, reason=reason, name=profile.engine, state=described["memory"])
    return _without_gpu(setting, available, why)


def check_engine(asked: str, profile: DeviceProfile, has_target: bool) -> None:
    """Raises InputError for an engine that does not exist or does not belong to the device."""
    if asked not in NAMES:
        raise InputError(f"unknown engine {asked!r}", f"Engines are: {', '.join(NAMES)}.")
    if asked not in ("auto", profile.engine) and not (has_target and {asked, profile.engine} <= set(GPU_RUNTIMES)):
        raise InputError(
            f"{profile.name} runs {profile.engine}, not {asked}",
            f"Leave --engine out, or choose a device of {asked} (`edgeprune devices`).",
        )


def _llamacpp(setting: tuple[DeviceProfile, Workload, str], target: Session | None) -> Engine:
    """Picks what runs llama.cpp: xllamacpp on a processor that has it, else llama-bench, else the estimator.

    xllamacpp is needed here too: it checks each file before anything is measured.
    """
    profile, workload, _ = setting
    if workload.batch != 1:
        raise InputError(
            f"llama.cpp is measured with one sequence at once, not with {workload.batch}", "Use --batch 1."
        )
    here = measure.describe(ThisMachine(), quiet)
    if here["modules"][RUNTIMES[LLAMA_CPP].module] is None:
        raise InputError(
            f"the engine llama.cpp is not usable here: {here['missing'][RUNTIMES[LLAMA_CPP].module]}",
            f"Install it with `{RUNTIMES[LLAMA_CPP].install_here}`.",
        )
    where = "this machine" if target is None else str(target)
    there = here if target is None else measure.describe(target, quiet)
    refusal = llama_tools.refusal_of(there, profile.sm)
    is_device = target is not None or profile.on_processor or (there["gpu"] or {}).get("sm") == profile.sm
    if is_device and refusal is None:
        tool, version = llama_tools.tool_of(there, profile.sm)
        device = there["processor"] if profile.on_processor else there["machine"]
        reason = f"{where} is a {device} with {tool} {version}"
        session = target or ThisMachine()
        return LlamaCpp(*setting, reason=reason, tool=tool, version=version, session=session)
    if target is None:
        reason = "llama-bench runs on the device itself, which is not reachable from here (--target ssh://USER@DEVICE)"
        return Estimated(*setting, reason=f"{reason}: latency and memory are estimates", name=LLAMA_CPP)
    raise InputError(f"{where} cannot measure with llama.cpp: {refusal}", llama_tools.REMEDY)


def _without_gpu(setting: tuple[DeviceProfile, Workload, str], available: bool, why: str) -> Engine:
    """Picks the engine for a GPU that is not there: a build without it where one is possible, else the estimator.

    available, why: whether the profile's engine can be imported, and its version or what is missing.
    """
    profile = setting[0]
    if profile.engine == "tensorrt-rtx" and not available:
        return Estimated(*setting, reason=f"nothing could be built: {why}", name="tensorrt-rtx")
    if profile.engine == "tensorrt-rtx":
        reason = f"TensorRT for RTX builds for SM {profile.sm} without the GPU; nothing ran on it"
        return BuiltAhead(*setting, reason=reason, sm=profile.sm)
    reason = (
        f"engines for SM {profile.sm} are built on the device itself, which is not reachable from here "
        "(--target ssh://USER@DEVICE reaches it): latency and memory are estimates"
    )
    if tensorrt.available("tensorrt-rtx")[0]:
        nearest = min(tensorrt.offered_sms(), key=lambda sm: abs(sm - profile.sm))
        reason += f"; TensorRT for RTX checks that the graph compiles for SM {nearest}"
        return BuiltAhead(*setting, reason=reason, sm=nearest, name="tensorrt")
    return Estimated(*setting, reason=reason)


def _on_target(
    asked: str, setting: tuple[DeviceProfile, Workload, str], target: Session, is_version_asked: bool
) -> Engine:
    """Picks the engine that the target has installed; an error names the command that installs one."""
    profile = setting[0]
    # Describe the device; every engine needs numpy.
    described = measure.describe(target, quiet)
    if described["modules"]["numpy"] is None:
        raise EngineError(f"{target} has no numpy", "Install it there: python3 -m pip install numpy")
    if profile.engine == "onnxruntime":
        _require(target, described, "onnxruntime")
        reason = f"{target} is a {described['processor']} with onnxruntime {described['modules']['onnxruntime']}"
        return OnnxRuntime(*setting, reason=reason, session=target)
    # The first engine for GPUs that is installed.
    wanted = [asked] if asked != "auto" else preferred(profile.engine)
    flavour = next((name for name in wanted if described["modules"][RUNTIMES[name].module]), None)
    if flavour is None:
        _require(target, described, wanted[0])
    # The GPU must be that of the profile.
    gpu = described["gpu"]
    if gpu is None:
        raise EngineError(
            f"{target}: {described['no_gpu']}", "Install cuda-python or pycuda there, and check the driver."
        )
    if gpu["sm"] != profile.sm:
        raise InputError(
            f"{target} has a {gpu['name']} of SM {gpu['sm']}, but the profile {profile.name} is for SM {profile.sm}",
            f"Give the profile of that device, or write one: python tools/probe_profile.py --target {target} "
            "--output device.toml",
        )
    version = described["modules"][RUNTIMES[flavour].module]
    reason = f"{target} is a {described['machine']} with {gpu['name']}, {flavour} {version} and {gpu['layer']}"
    setting = _reported(setting, flavour, version, is_version_asked)
    return TensorRT(*setting, reason=reason, name=flavour, session=target, state=described["memory"], where=str(target))


def _reported(
    setting: tuple[DeviceProfile, Workload, str], flavour: str, version: str, is_version_asked: bool
) -> tuple[DeviceProfile, Workload, str]:
    """Returns a setting for the version of TensorRT that a device reports, unless another one was asked for."""
    profile, workload, precision = setting
    if flavour == "tensorrt" and profile.tensorrt is not None and not is_version_asked:
        profile = in_precision(with_tensorrt(profile, version), precision)
    return profile, workload, precision


def _require(target: Session, described: dict[str, Any], engine: str) -> None:
    """Raises EngineError where the target lacks the module of an engine."""
    runtime = RUNTIMES[engine]
    if described["modules"][runtime.module] is None:
        raise EngineError(
            f"{target} has no Python module {runtime.module}", f"Install it there: {runtime.install_there}."
        )
