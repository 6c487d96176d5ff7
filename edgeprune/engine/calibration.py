"""The published points that each profile rests on, its figures by their fit, and the errors of that fit.

TensorRT's own points come first. A device without any has those of another runtime: on a module with the memory of
one that has both, or among the discrete GPUs, which are fitted together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

from edgeprune.engine.fits import (
    DecodeFit,
    DiscreteFit,
    PrefillFit,
    fit_decode,
    fit_discrete,
    fit_prefill,
    fit_siblings,
    leave_one_out,
)
from edgeprune.engine.published import PublishedPoint, points_of, published
from edgeprune.profiles import load_profile

EDGE = "tensorrt-edge-llm"
Predict = Callable[[PublishedPoint], float]


@dataclass(frozen=True)
class Origin:
    """A Jetson or a DGX Spark with points.

    profiles: those that take its fit, first its own. own: families of formats with an efficiency of their own, where
    they differ. peak: the profile whose fp16 rate prefill is compared with, where it is not the first. overhead_of: the
    device whose overhead is taken. sibling: the device with the same memory that has points of TensorRT as well as of
    the runtime of this class.
    """

    device: str
    profiles: tuple[str, ...]
    own: tuple[str, ...] = ()
    peak: str | None = None
    overhead_of: str | None = None
    sibling: tuple[str, str] | None = None
    remark: str = ""


ORIGINS = {
    origin.device: origin
    for origin in (
        Origin("AGX Orin 64 GB", ("jetson-agx-orin-64gb", "jetson-orin", "jetson-agx-orin-32gb"), own=("int4",)),
        Origin(
            "Orin NX 16 GB",
            ("jetson-orin-nx-16gb", "jetson-orin-nx-16gb-super", "jetson-orin-nx-8gb", "jetson-orin-nx-8gb-super"),
            peak="jetson-orin-nx-16gb-super",
            remark="power mode not stated",
        ),
        Origin(
            "Orin Nano 8 GB",
            ("jetson-orin-nano-8gb", "jetson-orin-nano-4gb"),
            overhead_of="Orin NX 16 GB",
            remark="power mode not stated, 68 GB/s fits",
        ),
        Origin(
            "Orin Nano 8 GB Super",
            ("jetson-orin-nano-8gb-super", "jetson-orin-nano-4gb-super"),
            sibling=("Orin Nano 8 GB", "mlc"),
        ),
        Origin("AGX Thor", ("jetson-thor",)),
        Origin("Thor T4000", ("jetson-thor-t4000",), sibling=("AGX Thor", "vllm")),
        Origin("DGX Spark (GB10)", ("dgx-spark",)),
    )
}
DISCRETE = {
    "a10": "A10",
    "a2": None,
    "a100-40gb": "A100 40GB",
    "a100-80gb": "A100 80GB SXM",
    "h100-pcie": "H100 PCIe",
    "h100-sxm": "H100 SXM",
    "l4": None,
    "l40s": "L40S",
    "rtx-4090": "RTX 4090",
    "rtx-5090": "RTX 5090",
    "rtx-a2000": "RTX A2000",
    "rtx-a4000": "RTX A4000",
}
"""The device with points of each discrete GPU's profile; None: the mean device."""

FIRST_TOKENS = {
    "A100 80GB": ("a100-80gb", "a100-40gb", "a10", "a2", "rtx-a2000", "rtx-a4000"),
    "H100 SXM": ("h100-sxm", "h100-pcie"),
    "L40S": ("l40s", "l4", "rtx-4090"),
}
"""The profiles that take the prefill of a discrete GPU with points of TensorRT-LLM: its own, then of its kind."""


def origin_of(profile: str) -> Origin | None:
    """Returns the Jetson or DGX Spark whose fit a profile takes; None: a discrete GPU's."""
    return next((origin for origin in ORIGINS.values() if profile in origin.profiles), None)


def same_module(profile: str, other: str) -> bool:
    """Returns whether a profile has the memory and the bandwidth of another."""
    one, two = load_profile(profile), load_profile(other)
    return (one.memory, one.bandwidth) == (two.memory, two.bandwidth)


def discrete_points() -> list[PublishedPoint]:
    """Returns the decode points of all discrete GPUs."""
    return [point for point in published()[0] if point.device not in ORIGINS and point.decode_ms is not None]


@cache
def discrete_fit() -> DiscreteFit:
    """Returns the fit over all discrete GPUs."""
    return fit_discrete(discrete_points())


def decode_points(device: str) -> list[PublishedPoint]:
    """Returns the points that the decode figures of a device rest on, its own and its sibling's."""
    origin = ORIGINS.get(device)
    if origin is None:
        return points_of(device)
    if origin.sibling is None:
        return points_of(device, EDGE)
    other, runtime_class = origin.sibling
    return points_of(device, runtime_class) + points_of(other, runtime_class)


def _predict_decode(origin: Origin) -> Callable[[Sequence[PublishedPoint]], Predict]:
    """Returns how the decode of a device is fitted: from points to what predicts one."""
    if origin.sibling is not None:

        def siblings(points: Sequence[PublishedPoint]) -> Predict:
            fits = fit_siblings(points, origin.device)
            return lambda point: fits[point.device == origin.device].decode_ms(point)

        return siblings
    return lambda points: _fit_own(origin, points).decode_ms


def _fit_own(origin: Origin, points: Sequence[PublishedPoint]) -> DecodeFit:
    """Returns the fit of a device's own points of TensorRT."""
    overhead = None if origin.overhead_of is None else decode_fit(origin.overhead_of).layer_overhead_ms
    return fit_decode(points, origin.own, overhead)


@cache
def decode_fit(device: str | None) -> DecodeFit:
    """Returns TensorRT's decode figures of a device; None: of a discrete GPU without points."""
    origin = ORIGINS.get(device)
    if origin is None:
        return discrete_fit().of(device)
    if origin.sibling is None:
        return _fit_own(origin, decode_points(device))
    # The same memory, so the same efficiency; the overhead is slower as it is in the other runtime.
    known = decode_fit(origin.sibling[0])
    return DecodeFit(known.efficiencies, known.layer_overhead_ms * overhead_ratio(device))


def overhead_ratio(device: str) -> float:
    """Returns the overhead of a device over that of its sibling, in the runtime that both have points of."""
    both = fit_siblings(decode_points(device), device)
    return both[True].layer_overhead_ms / both[False].layer_overhead_ms


@cache
def decode_errors(device: str) -> list[tuple[PublishedPoint, float, float]]:
    """Returns a device's own points with the errors of the fit and of the fit without the point."""
    origin = ORIGINS.get(device)
    if origin is None:
        return [entry for entry in _discrete_errors() if entry[0].device == device]
    points, fit = decode_points(device), _predict_decode(origin)
    predict = fit(points)
    return [
        (point, predict(point) / point.decode_ms - 1, out)
        for point, out in zip(points, leave_one_out(points, fit, "decode"), strict=True)
        if point.device == device
    ]


@cache
def _discrete_errors() -> list[tuple[PublishedPoint, float, float]]:
    points = discrete_points()
    outs = leave_one_out(points, lambda some: fit_discrete(some).decode_ms, "decode")
    return [
        (point, discrete_fit().decode_ms(point) / point.decode_ms - 1, out)
        for point, out in zip(points, outs, strict=True)
    ]


def prefill_points(device: str) -> list[PublishedPoint]:
    """Returns the points that the prefill figures of a device rest on: NVIDIA's runtimes alone."""
    return points_of(device, EDGE, "tensorrt-llm", kind="prefill")


def _fit_prefill(device: str) -> Callable[[Sequence[PublishedPoint]], PrefillFit]:
    """Returns how the prefill of a device is fitted: FP8's rate is twice fp16's; NVFP4 says nothing of floats."""
    origin = ORIGINS.get(device)
    profile = FIRST_TOKENS[device][0] if origin is None else origin.peak or origin.profiles[0]
    peak = load_profile(profile).fp16_compute.si
    overhead = decode_fit(device if device in ORIGINS else DISCRETE[profile]).layer_overhead_ms
    family = prefill_points(device)[0].family
    share, ratio = _mean_share(float_devices()) if family == "nvfp4" else None, 0.5 if family == "fp8" else 1.0
    return lambda points: fit_prefill(points, peak, overhead, share, ratio)


def float_devices() -> list[str]:
    """Returns the Jetsons whose points are of products of floats."""
    return [name for name in ORIGINS if (points := prefill_points(name)) and points[0].family != "nvfp4"]


def _mean_share(devices: Sequence[str]) -> float:
    return float(np.mean([prefill_fit(device).float_share for device in devices]))


@cache
def prefill_fit(device: str) -> PrefillFit:
    """Returns the prefill figures of a device with points of NVIDIA's runtimes."""
    return _fit_prefill(device)(prefill_points(device))


@cache
def prefill_errors(device: str) -> list[tuple[PublishedPoint, float, float]]:
    """Returns the prefill points of a device with the errors of the fit and of the fit without the point."""
    points, fit = prefill_points(device), _fit_prefill(device)
    outs = leave_one_out(points, lambda some: fit(some).prefill_ms, "prefill")
    return [
        (point, prefill_fit(device).prefill_ms(point) / point.prefill_ms - 1, out)
        for point, out in zip(points, outs, strict=True)
    ]


def leave_sizes_out(device: str, kind: Literal["decode", "prefill"]) -> list[float]:
    """Returns the error of each point by a fit without all points of its sizes and format: twins by another name."""
    points = decode_points(device) if kind == "decode" else prefill_points(device)
    errors = []
    for point in points:
        others = [p for p in points if (p.decoder, p.family) != (point.decoder, point.family)]
        if kind == "decode":
            errors.append(_predict_decode(ORIGINS[device])(others)(point) / point.decode_ms - 1)
        else:
            errors.append(_fit_prefill(device)(others).prefill_ms(point) / point.prefill_ms - 1)
    return errors


@dataclass(frozen=True)
class PrefillFigures:
    """Prefill figures that a profile takes of a fit.

    share: of the fp16 peak, of products of floats; of_format: of those of a format of its own, by its family. own: the
    device that the fit is of is the profile's.
    """

    device: str
    share: float
    of_format: dict[str, float]
    token_overhead_ns: float
    overhead_ms: float
    own: bool


def prefill_figures(profile: str) -> PrefillFigures:
    """Returns the prefill figures of a profile."""
    origin = origin_of(profile)
    if origin is None:
        device = next((name for name, taking in FIRST_TOKENS.items() if profile in taking), None)
        if device is None:
            return PrefillFigures(" and ".join(FIRST_TOKENS), _mean_share(tuple(FIRST_TOKENS)), {}, 0.0, 0.0, False)
        own = profile == FIRST_TOKENS[device][0]
    else:
        device = origin.device if origin.sibling is None else origin.sibling[0]
        own = same_module(profile, ORIGINS[device].profiles[0])
    fit, family = prefill_fit(device), prefill_points(device)[0].family
    of_format = {family: fit.share} if family in ("fp8", "nvfp4") else {}
    return PrefillFigures(device, fit.float_share, of_format, fit.token_overhead_ns, fit.overhead_ms, own)
