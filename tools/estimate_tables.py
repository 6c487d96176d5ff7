"""The tables of docs/estimates.md: what the fits of published latencies give, and their errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

import numpy as np

from edgeprune.engine.calibration import (
    DISCRETE,
    FIRST_TOKENS,
    ORIGINS,
    decode_errors,
    decode_fit,
    decode_points,
    discrete_fit,
    discrete_points,
    leave_sizes_out,
    origin_of,
    prefill_errors,
    prefill_figures,
    prefill_fit,
    prefill_points,
)
from edgeprune.engine.fits import OTHER, TENSORRT, DecodeFit, PrefillFit, leave_one_out
from edgeprune.engine.published import RUNTIMES, PublishedPoint, published
from edgeprune.profiles import list_profiles, load_profile
from tools.pages import table

NVIDIA = [device for device, origin in ORIGINS.items() if origin.sibling is None]


def percent(share: float, sign: str = "+") -> str:
    """Returns a share in percent."""
    return f"{100 * share:{sign}.1f} %"


def worst(errors: Sequence[float]) -> str:
    """Returns the largest error of either sign in percent."""
    return percent(max(map(abs, errors)), "")


def write_decode() -> str:
    """Returns the table of decode by NVIDIA's runtimes on Jetsons and DGX Spark."""
    columns = ["device", "model", "format", "past", "GB a step", "published", "fit", "error", "left out"]
    return table(
        columns,
        [
            [
                device,
                point.model + (" (uncertain)" if point.uncertain else ""),
                point.precision,
                str(point.past),
                f"{point.decode_bytes / 1e9:.3f}",
                f"{point.decode_ms:.2f} ms",
                f"{(1 + error) * point.decode_ms:.2f} ms",
                percent(error),
                percent(out),
            ]
            for device in NVIDIA
            for point, error, out in decode_errors(device)
        ],
    )


def write_others() -> str:
    """Returns the table of decode by other runtimes and on discrete GPUs, by device, runtime and format."""
    devices = [*(device for device in ORIGINS if device not in NVIDIA), *sorted({p.device for p in discrete_points()})]
    rows = []
    for device in devices:

        def kind(entry: tuple[PublishedPoint, float, float]) -> tuple[str, str]:
            return RUNTIMES[entry[0].runtime_class], entry[0].precision

        for (runtime, precision), group in groupby(sorted(decode_errors(device), key=kind), key=kind):
            entries = list(group)
            models = ", ".join(dict.fromkeys(point.model for point, _, _ in entries))
            uncertain = sum(point.uncertain for point, _, _ in entries)
            rows.append(
                [
                    device,
                    runtime,
                    precision,
                    f"{len(entries)}" + (f" ({uncertain} uncertain)" if uncertain else ""),
                    models,
                    worst([error for _, error, _ in entries]),
                    worst([out for _, _, out in entries]),
                ]
            )
    return table(["device", "runtime", "format", "points", "models", "worst error", "worst left out"], rows)


def write_factors() -> str:
    """Returns the table of the runtimes in the fit over discrete GPUs."""
    fit = discrete_fit()
    rows = [["TensorRT-LLM, MLC LLM, TurboMind, vLLM", "1", f"{1e3 * fit.overheads[TENSORRT]:.0f} us"]]
    for name, factor in fit.factors.items():
        overhead = fit.overheads.get(name.split(",")[0].removesuffix(" of few bits"), fit.overheads[TENSORRT])
        rows.append([name, f"{factor:.2f}", f"{1e3 * overhead:.0f} us"])
    return table(["runtime", "efficiency over TensorRT's", "overhead of a layer"], rows)


def write_prefill() -> str:
    """Returns the table of published prefill figures against the fit."""
    rows = []
    for device in (*NVIDIA, *FIRST_TOKENS):
        peak = prefill_fit(device).peak
        for point, error, out in prefill_errors(device):
            rows.append(
                [
                    device,
                    point.model,
                    point.precision,
                    str(point.prompt),
                    f"{point.prefill_flops / 1e12:.2f} TFLOP",
                    f"{point.prefill_ms:g} ms",
                    f"{point.prefill_flops / peak / point.prefill_ms * 1e3:.2f} of {peak / 1e12:g} TFLOP/s",
                    percent(error),
                    percent(out),
                ]
            )
    return table(["device", "model", "format", "prompt", "work", "published", "reached", "error", "left out"], rows)


def write_fits() -> str:
    """Returns the table of the figures of the profiles."""
    rows = []
    for profile in (profile.name for profile in list_profiles() if profile.is_probed):
        origin = origin_of(profile)
        device = DISCRETE[profile] if origin is None else origin.device
        decode, prefill = decode_fit(device), prefill_figures(profile)
        own = {name: value for name, value in decode.efficiencies.items() if name != OTHER}
        beside = [f"{prefill.token_overhead_ns:.0f} ns a token and layer"] if prefill.token_overhead_ns >= 0.5 else []
        beside += [f"{prefill.overhead_ms:.2f} ms"] if prefill.overhead_ms >= 0.005 else []
        rows.append(
            [
                profile,
                device or "mean device",
                f"{decode.efficiencies[OTHER]:.3f}" + "".join(f", {name} {value:.3f}" for name, value in own.items()),
                f"{1e3 * decode.layer_overhead_ms:.1f} us",
                prefill.device,
                f"{prefill.share:.3f}" + "".join(f", {name} {value:.3f}" for name, value in prefill.of_format.items()),
                ", ".join(beside),
            ]
        )
    columns = ["profile", "decode of", "efficiency", "overhead of a layer", "prefill of", "share of the fp16 peak"]
    return table([*columns, "beside products"], rows)


def write_twins() -> str:
    """Returns the table of the worst errors of decode and prefill where all points of the same sizes are left out."""
    rows = []
    for device in [name for name in NVIDIA if len(decode_points(name)) > 2]:
        decode, prefill = leave_sizes_out(device, "decode"), leave_sizes_out(device, "prefill")
        rows.append([device, worst(decode), worst(prefill)])
    return table(["device", "decode", "prefill"], rows)


Columns = Callable[[PublishedPoint], list[float]]  # ms for a unit of each unknown, then ms that are known


def _tried(points: Sequence[PublishedPoint], kind: str, columns: Columns) -> str:
    """Returns the worst error of points left out in turn by a model that is linear in its unknowns."""

    def fit(some: Sequence[PublishedPoint]) -> Callable[[PublishedPoint], float]:
        values = np.array([columns(point) for point in some])
        latencies = np.array([getattr(point, f"{kind}_ms") for point in some])
        unknowns = np.linalg.lstsq(values[:, :-1] / latencies[:, None], 1 - values[:, -1] / latencies, rcond=None)[0]
        return lambda point: float(np.dot(columns(point), [*unknowns, 1.0]))

    return worst(leave_one_out(points, fit, kind)) if len(points) > len(columns(points[0])) else ""


def write_models() -> str:
    """Returns the table of the models that were tried: worst errors of points left out."""

    def ideal(point: PublishedPoint) -> float:
        return 1e3 * point.decode_bytes / point.bandwidth

    def cache(point: PublishedPoint) -> float:
        return 1e3 * (point.decode_bytes - point.weight_bytes) / point.bandwidth

    models: dict[str, Columns] = {
        "efficiency alone": lambda p: [ideal(p), 0.0],
        "and a constant": lambda p: [ideal(p), 1.0, 0.0],
        "and a time for each layer": lambda p: [ideal(p), float(p.layers), 0.0],
        "and both": lambda p: [ideal(p), float(p.layers), 1.0, 0.0],
        "weights, cache and layers apart": lambda p: [ideal(p) - cache(p), cache(p), float(p.layers), 0.0],
    }
    sets = [(device, points) for device in NVIDIA if len(points := decode_points(device)) > 3]
    sets.append(("RTX 4090, ExLlamaV2", [p for p in discrete_points() if p.runtime_class == "exllamav2"]))
    rows = [[name, *(_tried(points, "decode", columns) for _, points in sets)] for name, columns in models.items()]
    own = [worst([out for _, _, out in decode_errors(device)]) if device in ORIGINS else "" for device, _ in sets]
    return table(["decode", *(name for name, _ in sets)], [*rows, ["the fit (formats apart where they differ)", *own]])


def write_prefill_models() -> str:
    """Returns the table of the models of prefill that were tried: worst errors of points left out."""
    devices = [device for device in (*NVIDIA, *FIRST_TOKENS) if len(prefill_points(device)) > 3]

    def columns(device: str, *unknowns: Columns, weights: bool = True) -> Columns:
        fit = prefill_fit(device)

        def of(point: PublishedPoint) -> list[float]:
            known = point.layers * fit.layer_overhead_ms
            known += 1e3 * point.weight_bytes / point.bandwidth if weights else 0.0
            return [1e3 * point.prefill_flops / fit.peak, *(x for unknown in unknowns for x in unknown(point)), known]

        return of

    models: dict[str, tuple[list[Columns], bool]] = {
        "share of the peak alone": ([], False),
        "and the weights once": ([], True),
        "and a constant": ([lambda p: [1.0]], True),
        "and a time for each token and layer": ([lambda p: [1e-6 * p.prompt * p.layers]], True),
        "and a time for each token, layer and channel": (
            [lambda p: [1e-6 * p.prompt * p.layers * p.decoder.hidden_size]],
            True,
        ),
    }
    rows = [
        [name, *(_tried(prefill_points(d), "prefill", columns(d, *unknowns, weights=weights)) for d in devices)]
        for name, (unknowns, weights) in models.items()
    ]
    own = [worst([out for _, _, out in prefill_errors(device)]) for device in devices]
    return table(["prefill", *devices], [*rows, ["the fit", *own]])


def trial_fits(point: PublishedPoint) -> tuple[DecodeFit, PrefillFit]:
    """Returns TensorRT's figures for a trial: those of the profile that the device has, as they are fitted."""
    profiles = {device: profile for profile, device in DISCRETE.items()}
    profile = ORIGINS[point.device].profiles[0] if point.device in ORIGINS else profiles[point.device]
    decode, figures = decode_fit(point.device), prefill_figures(profile)
    share = figures.of_format.get(point.family, figures.share)
    peak = load_profile(ORIGINS[point.device].peak or profile if point.device in ORIGINS else profile).fp16_compute.si
    prefill = PrefillFit(
        share, figures.share, peak, decode.layer_overhead_ms, figures.token_overhead_ns, figures.overhead_ms
    )
    return decode, prefill


def write_trials() -> str:
    """Returns the table of points that no fit uses: decode, and whole requests."""
    rows = []
    for point in published()[1]:
        decode, prefill = trial_fits(point)
        of = [point.device, point.runtime, point.precision, point.model + (" (uncertain)" if point.uncertain else "")]
        if point.decode_ms is not None:
            error = decode.decode_ms(point) / point.decode_ms - 1
            rows.append([*of, f"decode, past {point.past}", f"{point.decode_ms:.2f} ms", percent(error), point.source])
        if point.request_ms is not None:
            # The prefill gives the first of the generated tokens.
            steps = [point.prompt + step for step in range(point.generated - 1)]
            predicted = prefill.prefill_ms(point) + sum(decode.decode_ms(_at(point, past)) for past in steps)
            request = f"request, {point.prompt} and {point.generated} tokens"
            rows.append(
                [*of, request, f"{point.request_ms:g} ms", percent(predicted / point.request_ms - 1), point.source]
            )
    return table(["device", "runtime", "format", "model", "of", "published", "error of the estimate", "source"], rows)


def _at(point: PublishedPoint, past: int) -> PublishedPoint:
    return PublishedPoint(**{**vars(point), "past": past})


def write_prefill_trials() -> str:
    """Returns the table of prefill points that no fit uses, by device, format and length of the prompt."""

    def kind(point: PublishedPoint) -> tuple[str, str, bool]:
        return point.device, point.precision, point.prompt > 100

    points = sorted((point for point in published()[1] if point.prefill_ms is not None), key=kind)
    rows = []
    for (device, precision, _), group in groupby(points, key=kind):
        entries = list(group)
        errors = [trial_fits(point)[1].prefill_ms(point) / point.prefill_ms - 1 for point in entries]
        prompts = sorted({point.prompt for point in entries})
        span = f"{prompts[0]}" if len(prompts) == 1 else f"{prompts[0]} to {prompts[-1]}"
        rows.append([device, precision, span, str(len(entries)), percent(float(np.median(errors))), worst(errors)])
    return table(["device", "format", "prompts", "points", "median error", "worst error"], rows)


WRITERS: dict[str, Callable[[], str]] = {
    "fits": write_fits,
    "decode": write_decode,
    "twins": write_twins,
    "others": write_others,
    "factors": write_factors,
    "prefill": write_prefill,
    "models": write_models,
    "prefill-models": write_prefill_models,
    "trials": write_trials,
    "prefill-trials": write_prefill_trials,
}
