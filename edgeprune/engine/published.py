"""The efficiency and overhead of profiles, fitted to published latencies by least squares of relative errors.

    decode  = bytes per token / (efficiency x bandwidth) + overhead        linear in 1 / efficiency and overhead
    prefill = FLOPs / (share x peak rate) + overhead                       linear in 1 / share

It does not know our graphs: the points are of a runtime that updates its KV cache in place, and the copies that our
graphs make in addition are not part of them. The profiles hold the rounded fits; tools/estimates.py writes them there,
and a test compares the two. Points that were measured elsewhere can be fitted in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from edgeprune.engine.estimate import bytes_per_token, prefill_flops
from edgeprune.errors import InputError
from edgeprune.model.decoder import Attention, Decoder, Layer, Mlp, Rotary
from edgeprune.ondevice.figures import Workload
from edgeprune.precision import WEIGHT_FORMATS, GraphPrecision
from edgeprune.profiles import load_profile

RUNTIME = "NVIDIA TensorRT-Edge-LLM 0.10 llm_bench, TensorRT 10.16, cache in place"
AWQ = WEIGHT_FORMATS["int4-128"]
SETTING = "INT4 AWQ, batch 1"
WORKLOAD = Workload(batch=1, prompt=2048, context=2049)  # published at past 2048; the step's own token is one more


@dataclass(frozen=True)
class PublishedPoint:
    """One model's latencies in ms on one device; in_place: the runtime appends to one buffer of the KV cache."""

    model: str
    decoder: Decoder
    precision: GraphPrecision
    workload: Workload
    decode_ms: float
    prefill_ms: float
    in_place: bool = True

    @property
    def decode_bytes(self) -> float:
        """Returns the bytes that one decode step moves."""
        return bytes_per_token(self.decoder, self.precision, self.workload, self.in_place).total

    @property
    def prefill_flops(self) -> float:
        """Returns the FLOPs of the prefill."""
        return prefill_flops(self.decoder, self.workload)


@dataclass(frozen=True)
class DecodeFit:
    """A fit of decode; efficiency: share of the bandwidth; overhead_ms: time that does not scale with bytes."""

    efficiency: float
    overhead_ms: float

    def decode_ms(self, point: PublishedPoint, bandwidth: float) -> float:
        """Returns the predicted decode in ms; bandwidth: in bytes/s."""
        return 1e3 * point.decode_bytes / (self.efficiency * bandwidth) + self.overhead_ms

    def error(self, point: PublishedPoint, bandwidth: float) -> float:
        """Returns the relative error of the prediction: predicted over published, less one."""
        return self.decode_ms(point, bandwidth) / point.decode_ms - 1


def fit_decode(points: Sequence[PublishedPoint], bandwidth: float, overhead_ms: float | None = None) -> DecodeFit:
    """Returns the efficiency and the overhead that fit decode best, or the efficiency alone at a given overhead.

    bandwidth: in bytes/s. Raises InputError for points that do not determine them, and for points that need an
    efficiency outside 0 to 1 or an overhead below 0.
    """
    # Set up the linear problem in 1 / efficiency and overhead, in relative errors.
    published = np.array([point.decode_ms for point in points])
    ideal = np.array([1e3 * point.decode_bytes / bandwidth for point in points])
    columns = [ideal / published] + ([1 / published] if overhead_ms is None else [])
    design = np.stack(columns, axis=1)  # (points, unknowns)
    if np.linalg.matrix_rank(design) < len(columns):
        raise InputError(
            f"{len(points)} points do not determine {len(columns)} figures", "Add a point of another model size."
        )
    # Solve it, and check the bounds.
    target = 1 - (overhead_ms or 0.0) / published
    inverse, *fitted = np.linalg.lstsq(design, target, rcond=None)[0]
    overhead = fitted[0] if overhead_ms is None else overhead_ms
    # A tenth of a permille is rounding: points may lie exactly on a bound.
    if inverse < 1 - 1e-4 or overhead < -1e-4 * float(published.min()):
        raise InputError(
            f"the points need an efficiency of {1 / inverse:.3g} and an overhead of {overhead:.3g} ms",
            "Check their units and the bandwidth; an efficiency is at most 1, an overhead at least 0.",
        )
    return DecodeFit(min(1.0, 1 / float(inverse)), max(0.0, float(overhead)))


def leave_one_out(points: Sequence[PublishedPoint], bandwidth: float, overhead_ms: float | None = None) -> list[float]:
    """Returns the error of every point, in order, by the fit of the others: predicted over published, less one."""
    return [
        fit_decode([other for other in points if other is not point], bandwidth, overhead_ms).error(point, bandwidth)
        for point in points
    ]


def prefill_share(point: PublishedPoint, peak: float, overhead_ms: float) -> float:
    """Returns the share of the dense peak rate (FLOP/s) that a point's prefill reached."""
    return point.prefill_flops / peak / ((point.prefill_ms - overhead_ms) / 1e3)


def fit_prefill(points: Sequence[PublishedPoint], peak: float, overhead_ms: float) -> float:
    """Returns the share of the dense peak rate (FLOP/s) that fits the prefill of all points best."""
    published = np.array([point.prefill_ms for point in points])
    relative = np.array([1e3 * point.prefill_flops / peak for point in points]) / published
    return float(relative @ relative / (relative @ (1 - overhead_ms / published)))


def _qwen3(hidden: int, layers: int, heads: int, intermediate: int, tied: bool) -> Decoder:
    """Returns a Qwen3: 8 key/value heads of 128, 151936 tokens; the norms of queries and keys are negligible."""
    layer = Layer(Attention(heads, 8, 128, Rotary((1.0,) * 64)), Mlp(intermediate))
    return Decoder("qwen3", hidden, 151936, 40960, 1e-6, tied, (layer,) * layers)


QWEN3 = {
    "Qwen3-0.6B": _qwen3(1024, 28, 16, 3072, tied=True),
    "Qwen3-1.7B": _qwen3(2048, 28, 16, 6144, tied=True),
    "Qwen3-4B": _qwen3(2560, 36, 32, 9728, tied=True),
    "Qwen3-8B": _qwen3(4096, 36, 32, 12288, tied=False),
}


def _points(figures: Sequence[tuple[float, float]]) -> tuple[PublishedPoint, ...]:
    """Returns the points of the models of QWEN3 in order; figures: tokens/s of decode, and ms of prefill."""
    return tuple(
        PublishedPoint(model, decoder.with_format(AWQ), "fp16", WORKLOAD, 1e3 / tokens_per_second, prefill_ms)
        for (model, decoder), (tokens_per_second, prefill_ms) in zip(QWEN3.items(), figures, strict=False)
    )


@dataclass(frozen=True)
class Origin:
    """A device with published points.

    profile: that takes the fit; peak: the profile whose fp16 rate the prefill is compared with; others: further
    profiles that take the fit; remark: on the points; shared: the label of the device whose overhead is taken, where
    the points are too few for one.
    """

    label: str
    profile: str
    peak: str
    points: tuple[PublishedPoint, ...]
    others: tuple[str, ...]
    remark: str = ""
    shared: str | None = None


ORIGINS = {
    origin.label: origin
    for origin in (
        Origin(
            "AGX Orin 64 GB",
            "jetson-agx-orin-64gb",
            "jetson-agx-orin-64gb",
            _points([(162.5, 118.5), (89.5, 308.3), (50.7, 761.9), (30.6, 1384.0)]),
            ("jetson-orin", "jetson-agx-orin-32gb"),
        ),
        Origin(
            "Orin NX 16 GB",
            "jetson-orin-nx-16gb",
            "jetson-orin-nx-16gb-super",
            _points([(98.9, 268.8), (52.2, 674.0), (29.2, 1880.0), (17.5, 2944.0)]),
            ("jetson-orin-nx-16gb-super", "jetson-orin-nx-8gb", "jetson-orin-nx-8gb-super"),
            "power mode not stated",
        ),
        Origin(
            "Orin Nano 8 GB",
            "jetson-orin-nano-8gb",
            "jetson-orin-nano-8gb",
            _points([(61.0, 445.0), (32.3, 1021.0)]),
            ("jetson-orin-nano-8gb-super", "jetson-orin-nano-4gb", "jetson-orin-nano-4gb-super"),
            "power mode not stated, 68 GB/s fits",
            "Orin NX 16 GB",
        ),
    )
}


@cache
def fit_of(label: str) -> tuple[DecodeFit, float]:
    """Returns the decode fit of a device with points, and the share of the fp16 peak that its prefill reaches."""
    origin = ORIGINS[label]
    overhead = None if origin.shared is None else fit_of(origin.shared)[0].overhead_ms
    decode = fit_decode(origin.points, load_profile(origin.profile).bandwidth.si, overhead)
    return decode, fit_prefill(origin.points, load_profile(origin.peak).fp16_compute.si, decode.overhead_ms)


def default_fit(without: str | None = None) -> tuple[DecodeFit, float]:
    """Returns the fit for devices without points: the mean over the devices whose points give both figures.

    without: the label of a device to leave out.
    """
    fits = [fit_of(label) for label, origin in ORIGINS.items() if origin.shared is None and label != without]
    efficiency, overhead = (float(np.mean([getattr(fit, name) for fit, _ in fits])) for name in vars(fits[0][0]))
    return DecodeFit(efficiency, overhead), float(np.mean([share for _, share in fits]))
