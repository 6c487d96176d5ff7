"""Which engine builds and measures for a device, where, and why; each one behind the same small interface."""

from __future__ import annotations

from typing import Any

from edgeprune.engine.engines import Ahead, Engine, Estimated, OnnxRuntime, TensorRT
from edgeprune.errors import EngineError, InputError
from edgeprune.ondevice import measure, tensorrt
from edgeprune.ondevice.figures import Workload
from edgeprune.ondevice.measure import Here, Session
from edgeprune.ondevice.runtimes import GPU_RUNTIMES, RUNTIMES, preferred
from edgeprune.ondevice.worker import quiet
from edgeprune.profiles import DeviceProfile

NAMES = ("auto", *RUNTIMES)


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
    if asked not in ("auto", profile.engine) and not (target and {asked, profile.engine} <= set(GPU_RUNTIMES)):
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
        raise InputError(
            f"the engine {asked} is not usable here: {why}",
            f"Install it with `{RUNTIMES[asked].install_here}`, or leave --engine out to estimate.",
        )
    if available and (gpu := measure.describe(Here(), quiet)["gpu"]) and gpu["sm"] == profile.sm:
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
    found = measure.describe(target, quiet)
    if found["modules"]["numpy"] is None:
        raise EngineError(f"{target} has no numpy", "Install it there: python3 -m pip install numpy")
    if profile.engine == "onnxruntime":
        _require(target, found, "onnxruntime")
        reason = f"{target} is a {found['processor']} with onnxruntime {found['modules']['onnxruntime']}"
        return OnnxRuntime(*parts, reason=reason, session=target)
    wanted = [asked] if asked != "auto" else preferred(profile.engine)
    flavour = next((name for name in wanted if found["modules"][RUNTIMES[name].module]), None)
    if flavour is None:
        _require(target, found, wanted[0])
    gpu = found["gpu"]
    if gpu is None:
        raise EngineError(f"{target}: {found['no_gpu']}", "Install cuda-python or pycuda there, and check the driver.")
    if gpu["sm"] != profile.sm:
        raise InputError(
            f"{target} has a {gpu['name']} of SM {gpu['sm']}, the profile {profile.name} is for SM {profile.sm}",
            f"Give the profile of that device, or write one: python tools/probe_profile.py --target {target} "
            "--output device.toml",
        )
    version = found["modules"][RUNTIMES[flavour].module]
    reason = f"{target} is a {found['machine']} with {gpu['name']}, {flavour} {version} and {gpu['layer']}"
    return TensorRT(*parts, reason=reason, name=flavour, session=target)


def _require(target: Session, found: dict[str, Any], engine: str) -> None:
    """Raises EngineError where the target lacks the module of an engine."""
    runtime = RUNTIMES[engine]
    if found["modules"][runtime.module] is None:
        raise EngineError(
            f"{target} has no Python module {runtime.module}", f"Install it there: {runtime.install_there}."
        )
