"""Published latencies -> the efficiency and overhead of a profile, by least squares of relative errors.

    decode  = bytes per token / (efficiency x bandwidth) + overhead        linear in 1 / efficiency and overhead
    prefill = FLOPs / (share x peak rate) + overhead                       linear in 1 / share

The profiles hold the rounded fits; tools/estimates.py writes them there, and a test compares. The points
are of a runtime that keeps its cache in place: what a graph of ours copies in addition is no part of them.
Points measured elsewhere fit the same way.
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
from edgeprune.precision import PrecisionName
from edgeprune.profiles import load_profile

RUNTIME = "NVIDIA TensorRT-Edge-LLM 0.10 llm_bench, TensorRT 10.16, cache in place"
SETTING = "INT4 AWQ, batch 1"
WORKLOAD = Workload(batch=1, prompt=2048, context=2049)  # published at past 2048; the step's own token is one more


@dataclass(frozen=True)
class PublishedPoint:
    """One model's latencies on one device in ms. in_place: the runtime appends to one cache buffer."""

    model: str
    decoder: Decoder
    precision: PrecisionName
    workload: Workload
    decode_ms: float
    prefill_ms: float
    in_place: bool = True

    @property
    def decode_bytes(self) -> float:
        return bytes_per_token(self.decoder, self.precision, self.workload, self.in_place).total

    @property
    def prefill_flops(self) -> float:
        return prefill_flops(self.decoder, self.workload)


@dataclass(frozen=True)
class DecodeFit:
    """efficiency: share of the bandwidth that decode reaches; overhead_ms: what does not scale with bytes."""

    efficiency: float
    overhead_ms: float

    def decode_ms(self, point: PublishedPoint, bandwidth: float) -> float:
        """bandwidth in bytes/s."""
        return 1e3 * point.decode_bytes / (self.efficiency * bandwidth) + self.overhead_ms

    def error(self, point: PublishedPoint, bandwidth: float) -> float:
        """Predicted over published, less one."""
        return self.decode_ms(point, bandwidth) / point.decode_ms - 1


def fit_decode(points: Sequence[PublishedPoint], bandwidth: float, overhead_ms: float | None = None) -> DecodeFit:
    """Efficiency and overhead that fit decode best, or the efficiency alone at a given overhead.

    bandwidth in bytes/s. Raises InputError for points that do not determine them, or that no efficiency
    from 0 to 1 with an overhead from 0 up explains.
    """
    published = np.array([point.decode_ms for point in points])
    ideal = np.array([1e3 * point.decode_bytes / bandwidth for point in points])
    columns = [ideal / published] + ([1 / published] if overhead_ms is None else [])
    design = np.stack(columns, axis=1)  # (points, unknowns)
    if np.linalg.matrix_rank(design) < len(columns):
        raise InputError(
            f"{len(points)} points do not determine {len(columns)} figures", "Add a point of another model size."
        )
    target = 1 - (overhead_ms or 0.0) / published
    inverse, *fitted = np.linalg.lstsq(design, target, rcond=None)[0]
    overhead = fitted[0] if overhead_ms is None else overhead_ms
    # A tenth of a permille is rounding: points that lie exactly on a bound are no contradiction.
    if inverse < 1 - 1e-4 or overhead < -1e-4 * float(published.min()):
        raise InputError(
            f"the points ask for an efficiency of {1 / inverse:.3g} and an overhead of {overhead:.3g} ms",
            "Check their units and the bandwidth; an efficiency is at most 1, an overhead at least 0.",
        )
    return DecodeFit(min(1.0, 1 / float(inverse)), max(0.0, float(overhead)))


def leave_one_out(points: Sequence[PublishedPoint], bandwidth: float, overhead_ms: float | None = None) -> list[float]:
    """The error of every point by the fit of the others, in their order: predicted over published, less one."""
    return [
        fit_decode([other for other in points if other is not point], bandwidth, overhead_ms).error(point, bandwidth)
        for point in points
    ]


def prefill_share(point: PublishedPoint, peak: float, overhead_ms: float) -> float:
    """The share of the dense peak rate (FLOP/s) that a point's prefill reached."""
    return point.prefill_flops / peak / ((point.prefill_ms - overhead_ms) / 1e3)


def fit_prefill(points: Sequence[PublishedPoint], peak: float, overhead_ms: float) -> float:
    """The share of the dense peak rate (FLOP/s) that fits prefill best."""
    published = np.array([point.prefill_ms for point in points])
    relative = np.array([1e3 * point.prefill_flops / peak for point in points]) / published
    return float(relative @ relative / (relative @ (1 - overhead_ms / published)))


def _qwen3(hidden: int, layers: int, heads: int, intermediate: int, tied: bool) -> Decoder:
    """8 key/value heads of 128 and 151936 tokens; the norms of queries and keys are negligible."""
    layer = Layer(Attention(heads, 8, 128, Rotary((1.0,) * 64)), Mlp(intermediate))
    return Decoder("qwen3", hidden, 151936, 40960, 1e-6, tied, (layer,) * layers)


QWEN3 = {
    "Qwen3-0.6B": _qwen3(1024, 28, 16, 3072, tied=True),
    "Qwen3-1.7B": _qwen3(2048, 28, 16, 6144, tied=True),
    "Qwen3-4B": _qwen3(2560, 36, 32, 9728, tied=True),
    "Qwen3-8B": _qwen3(4096, 36, 32, 12288, tied=False),
}


def _points(figures: Sequence[tuple[float, float]]) -> tuple[PublishedPoint, ...]:
    """figures: tokens/s of decode and ms of prefill for the models of QWEN3, in their order."""
    return tuple(
        PublishedPoint(model, decoder, "int4", WORKLOAD, 1e3 / tokens_per_second, prefill_ms)
        for (model, decoder), (tokens_per_second, prefill_ms) in zip(QWEN3.items(), figures, strict=False)
    )


@dataclass(frozen=True)
class Origin:
    """A device with points. peak: the profile whose fp16 rate its prefill is compared with; others: profiles
    that take its figures; shared: the device that its overhead is taken from, where too few points give one."""

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
    """The decode fit of a device with points, and the share of the fp16 peak that its prefill reaches."""
    origin = ORIGINS[label]
    overhead = None if origin.shared is None else fit_of(origin.shared)[0].overhead_ms
    decode = fit_decode(origin.points, load_profile(origin.profile).bandwidth.si, overhead)
    return decode, fit_prefill(origin.points, load_profile(origin.peak).fp16_compute.si, decode.overhead_ms)


def default_fit(without: str | None = None) -> tuple[DecodeFit, float]:
    """For devices without points: the mean over the devices whose points give both figures, less `without`."""
    fits = [fit_of(label) for label, origin in ORIGINS.items() if origin.shared is None and label != without]
    efficiency, overhead = (float(np.mean([getattr(fit, name) for fit, _ in fits])) for name in vars(fits[0][0]))
    return DecodeFit(efficiency, overhead), float(np.mean([share for _, share in fits]))
