"""The figures of profiles, fitted to published latencies (published.py) by least squares of relative errors.

    decode  = bytes / (efficiency x bandwidth) + layers x layer overhead
    prefill = FLOPs / (share x fp16 peak) + weights / bandwidth + layers x layer overhead
              + tokens x layers x token overhead, or + a constant

The bytes, or the products, of the layers' matrices may have an efficiency, or a share, of their format's own; all else
(head, cache, attention) has that of floats.

Linear in the unknowns for the points of one runtime on one device, or on two that share an efficiency. Discrete GPUs
have few points of any one runtime: one fit over all of them (fit_discrete), with a factor for each runtime, TensorRT 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares, lsq_linear

from edgeprune.engine.published import PublishedPoint
from edgeprune.errors import InputError

OTHER = "other"  # formats without an efficiency of their own
TENSORRT = "tensorrt"

# Spreads of the priors of fit_discrete, relative: an efficiency about the mean device, a runtime's factor about 1, its
# overhead about TensorRT's; and the noise of a point.
DEVICE_SPREAD, RUNTIME_SPREAD, OVERHEAD_SPREAD, NOISE = 0.15, 0.3, 0.4, 0.05
MOST_EFFICIENT = 0.95  # that a few points may make of a discrete GPU

Points = Sequence[PublishedPoint]


@dataclass(frozen=True)
class DecodeFit:
    """A fit of decode on one device: shares of the bandwidth by family of formats, and ms for each layer."""

    efficiencies: dict[str, float]
    layer_overhead_ms: float

    def decode_ms(self, point: PublishedPoint) -> float:
        """Returns the predicted decode in ms."""
        own = point.family if point.family in self.efficiencies else OTHER
        read_ms = sum(ms / self.efficiencies[family] for family, ms in _ideal_ms(point, own).items())
        return read_ms + point.layers * self.layer_overhead_ms


@dataclass(frozen=True)
class PrefillFit:
    """A fit of prefill: shares of the dense fp16 peak that the layers' matrices reach in the points' format, and that
    all else reaches; ms for each layer as of a decode step, ns for each token and layer, and a constant in ms."""

    share: float
    float_share: float
    peak: float
    layer_overhead_ms: float
    token_overhead_ns: float = 0.0
    overhead_ms: float = 0.0

    def prefill_ms(self, point: PublishedPoint) -> float:
        """Returns the predicted prefill in ms."""
        matrices_ms, rest_ms = _compute_ms(point, self.peak)
        tokens_ms = 1e-6 * self.token_overhead_ns * point.prompt * point.layers
        fixed_ms = _weights_ms(point) + point.layers * self.layer_overhead_ms + self.overhead_ms
        return matrices_ms / self.share + rest_ms / self.float_share + tokens_ms + fixed_ms


def _ideal_ms(point: PublishedPoint, own: str = OTHER) -> dict[str, float]:
    """Returns the ms that the bytes of a step take at the whole bandwidth, by the family whose efficiency they have."""
    all_ms, matrices_ms = (1e3 * size / point.bandwidth for size in (point.decode_bytes, point.matrix_bytes))
    return {OTHER: all_ms} if own == OTHER else {own: matrices_ms, OTHER: all_ms - matrices_ms}


def _compute_ms(point: PublishedPoint, peak: float) -> tuple[float, float]:
    """Returns the ms that the products of the layers' matrices, and all others, take at the peak rate."""
    return 1e3 * point.matrix_flops / peak, 1e3 * (point.prefill_flops - point.matrix_flops) / peak


def _weights_ms(point: PublishedPoint) -> float:
    return 1e3 * point.weight_bytes / point.bandwidth


def _solve(
    columns: Sequence[Sequence[float]],
    latencies: Sequence[float],
    known: Sequence[float] | float = 0.0,
    least: Sequence[float] | float = 0.0,
) -> np.ndarray:
    """Returns the unknowns that fit the latencies best, relatively.

    columns: (unknowns, points) ms for a unit of each unknown; latencies: (points,) ms; known: (points,) ms that are not
    fitted; least: (unknowns,) bounds. Raises InputError for points that do not determine the unknowns.
    """
    latencies = np.asarray(latencies)
    design = np.array(columns).T / latencies[:, None]  # (points, unknowns)
    if np.linalg.matrix_rank(design) < design.shape[1]:
        raise InputError(
            f"{len(latencies)} points do not determine {design.shape[1]} figures", "Add a point of another model size."
        )
    return lsq_linear(design, 1 - np.asarray(known) / latencies, bounds=(least, np.inf), tol=1e-14).x


def fit_decode(points: Points, own: tuple[str, ...] = (), layer_overhead_ms: float | None = None) -> DecodeFit:
    """Returns the efficiencies and the layer overhead that fit decode best, or the efficiencies alone at an overhead.

    own: families of formats that have an efficiency of their own. Raises InputError for too few points.
    """
    ideal = [_ideal_ms(point, point.family if point.family in own else OTHER) for point in points]
    names = sorted(set().union(*ideal))
    columns = [[ms.get(name, 0.0) for ms in ideal] for name in names]
    latencies, layers = [point.decode_ms for point in points], np.array([point.layers for point in points])
    # An efficiency is at most 1, an overhead at least 0.
    if layer_overhead_ms is None:
        least = [1.0] * len(names) + [0.0]
        *inverses, layer_overhead_ms = _solve([*columns, layers], latencies, least=least)
    else:
        inverses = _solve(columns, latencies, layers * layer_overhead_ms, least=1.0)
    efficiencies = {name: 1 / float(inverse) for name, inverse in zip(names, inverses, strict=True)}
    return DecodeFit(efficiencies, float(layer_overhead_ms))


def fit_siblings(points: Points, first: str) -> dict[bool, DecodeFit]:
    """Returns a fit for the device of this name and one for the other, which share the efficiency: the same memory."""
    is_first = np.array([point.device == first for point in points])
    layers = np.array([point.layers for point in points])
    columns = [[_ideal_ms(point)[OTHER] for point in points], layers * is_first, layers * ~is_first]
    inverse, *overheads = _solve(columns, [point.decode_ms for point in points], least=[1.0, 0.0, 0.0])
    pairs = zip((True, False), overheads, strict=True)
    return {mine: DecodeFit({OTHER: 1 / float(inverse)}, float(overhead)) for mine, overhead in pairs}


def fit_prefill(
    points: Points, peak: float, layer_overhead_ms: float, float_share: float | None = None, float_ratio: float = 1.0
) -> PrefillFit:
    """Returns the prefill figures that fit best.

    peak: dense fp16 FLOP/s. layer_overhead_ms: that of decode. float_share: of all but the layers' matrices, where it
    is known; else float_ratio: that share over the matrices'.

    Points of one prompt length give a time for each token and layer, those of several a constant: which of both it is,
    one length does not tell, and prompts of 60 to 400 tokens that are not in the fit speak for the tokens. Two points
    give the share alone.
    """
    compute = [_compute_ms(point, peak) for point in points]
    known = [_weights_ms(point) + point.layers * layer_overhead_ms for point in points]
    if float_share is None:
        columns = [[matrices + rest / float_ratio for matrices, rest in compute]]
    else:
        columns = [[matrices for matrices, _ in compute]]
        known = [ms + rest / float_share for ms, (_, rest) in zip(known, compute, strict=True)]
    several = len({point.prompt for point in points}) > 1
    if len(points) > 2:
        columns.append([1.0 if several else 1e-6 * point.prompt * point.layers for point in points])
    inverse, *rest = map(float, _solve(columns, [point.prefill_ms for point in points], known))
    overhead = rest[0] if rest else 0.0
    return PrefillFit(
        share=1 / inverse,
        float_share=float_ratio / inverse if float_share is None else float_share,
        peak=peak,
        layer_overhead_ms=layer_overhead_ms,
        token_overhead_ns=0.0 if several else overhead,
        overhead_ms=overhead if several else 0.0,
    )


@dataclass(frozen=True)
class DiscreteFit:
    """The fit over all discrete GPUs.

    efficiencies: TensorRT's share of the bandwidth by device; mean: that of a device without points. factors: another
    runtime's efficiency over TensorRT's; overheads: ms for each layer by runtime.
    """

    efficiencies: dict[str, float]
    mean: float
    factors: dict[str, float]
    overheads: dict[str, float]

    def of(self, device: str | None) -> DecodeFit:
        """Returns the figures of TensorRT on a device; None: on one without points."""
        return DecodeFit({OTHER: self.efficiencies.get(device, self.mean)}, self.overheads[TENSORRT])

    def decode_ms(self, point: PublishedPoint) -> float:
        """Returns the predicted decode in ms of the point's runtime."""
        efficiency = self.efficiencies.get(point.device, self.mean) * self.factors.get(reads_like(point), 1.0)
        overhead = self.overheads.get(launches_like(point), self.overheads[TENSORRT])
        return 1e3 * point.decode_bytes / (efficiency * point.bandwidth) + point.layers * overhead


def reads_like(point: PublishedPoint) -> str:
    """Returns the runtime whose factor a point takes: compiled runtimes are one with TensorRT, as the points say."""
    if point.runtime_class == "gpt-fast":
        return "gpt-fast" if point.precision == "fp16" else "gpt-fast of few bits"
    if point.runtime_class == "llama.cpp-2024":
        return "llama.cpp of 2024, F16" if point.precision == "gguf_f16" else "llama.cpp of 2024, Q4_K_M"
    names = {"exllamav2": "ExLlamaV2", "llama.cpp-2026": "llama.cpp of 2025 and 2026, Q4_K_M"}
    return names.get(point.runtime_class, TENSORRT)


def launches_like(point: PublishedPoint) -> str:
    """Returns the runtime whose overhead a point takes."""
    names = {
        "gpt-fast": "gpt-fast",
        "llama.cpp-2024": "llama.cpp of 2024",
        "llama.cpp-2026": "llama.cpp of 2025 and 2026",
    }
    return names.get(point.runtime_class, TENSORRT)


def fit_discrete(points: Points) -> DiscreteFit:
    """Returns the most likely figures of all discrete GPUs and runtimes, in logarithms, with the priors above."""
    devices = sorted({point.device for point in points})
    readers = sorted({reads_like(point) for point in points} - {TENSORRT})
    launchers = sorted({launches_like(point) for point in points} - {TENSORRT})
    device = np.array([devices.index(point.device) for point in points])
    # TensorRT is the last of its kind, with a factor of 1.
    reader = np.array([[*readers, TENSORRT].index(reads_like(point)) for point in points])
    launcher = np.array([[*launchers, TENSORRT].index(launches_like(point)) for point in points])
    ideal, layers = (np.array(x) for x in zip(*((_ideal_ms(p)[OTHER], p.layers) for p in points), strict=True))
    latencies = np.array([point.decode_ms for point in points])
    ends = np.cumsum([2, len(devices), len(readers)])

    def residuals(x: np.ndarray) -> np.ndarray:
        (mean, base), efficiencies, factors, overheads = np.split(x, ends)
        rates = efficiencies[device] + np.append(factors, 0.0)[reader]
        predicted = ideal * np.exp(-rates) + layers * np.exp(base + np.append(overheads, 0.0)[launcher])
        return np.concatenate(
            [
                np.log(predicted / latencies) / NOISE,
                (efficiencies - mean) / DEVICE_SPREAD,
                factors / RUNTIME_SPREAD,
                overheads / OVERHEAD_SPREAD,
            ]
        )

    # All unknowns are logarithms.
    mean, base = np.log(0.8), np.log(0.04)
    start = np.concatenate([[mean, base], np.full(len(devices), mean), np.zeros(len(readers) + len(launchers))])
    most = np.full(len(start), np.inf)
    most[2 : ends[1]] = np.log(MOST_EFFICIENT)
    solution = least_squares(residuals, start, bounds=(-np.inf, most)).x
    (mean, base), efficiencies, factors, overheads = np.split(solution, ends)
    return DiscreteFit(
        {name: float(np.exp(x)) for name, x in zip(devices, efficiencies, strict=True)},
        float(np.exp(mean)),
        {name: float(np.exp(x)) for name, x in zip(readers, factors, strict=True)},
        {name: float(np.exp(base + x)) for name, x in zip([*launchers, TENSORRT], [*overheads, 0.0], strict=True)},
    )


def leave_one_out(points: Points, fit: Callable[[Points], Callable[[PublishedPoint], float]], kind: str) -> list[float]:
    """Returns the error of each point by the fit of all others: predicted over published, less one.

    fit: returns what predicts a point's ms of this kind, decode or prefill.
    """
    return [
        fit([other for other in points if other is not point])(point) / getattr(point, f"{kind}_ms") - 1
        for point in points
    ]
