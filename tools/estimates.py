"""The figures of profiles/*.toml and the tables of docs/estimates.md, computed from the published points.

    python tools/estimates.py

Seconds; it changes nothing where all is up to date. The points and the fit are edgeprune/engine/published.py.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from edgeprune.engine.published import (
    ORIGINS,
    RUNTIME,
    SETTING,
    Origin,
    default_fit,
    fit_of,
    leave_one_out,
    prefill_share,
)
from edgeprune.profiles import Confidence, HardwareFigure, list_profiles, load_profile, profiles_folder
from tools.pages import filled

PAGE = Path(__file__).parents[1] / "docs" / "estimates.md"
WITH_BOTH = " and ".join(label for label, origin in ORIGINS.items() if origin.shared is None)


def origin_of(profile: str) -> Origin | None:
    """Returns the device with points that a profile's figures rest on; None: the default."""
    return next((origin for origin in ORIGINS.values() if profile in (origin.profile, *origin.others)), None)


def figures_of(profile: str) -> dict[str, HardwareFigure]:
    """Returns decode_efficiency, decode_overhead and prefill_efficiency of a profile, rounded, each with its source
    and confidence."""
    origin = origin_of(profile)
    decode, prefill = default_fit() if origin is None else fit_of(origin.label)
    overhead_source = _decode_source(origin)
    if origin is not None and origin.shared is not None:
        overhead_source = f"shared from {origin.shared}: {_decode_source(ORIGINS[origin.shared])}"
    trust: tuple[Confidence, Confidence] = ("low", "low")
    if origin is not None and origin.shared is None:
        # The same memory of the same device: only the module's own points make the figure sure.
        own = _same_module(profile, origin)
        trust = ("high" if own else "medium", "medium" if own and not origin.remark else "low")
    return {
        "decode_efficiency": _figure(round(decode.efficiency, 3), "1", _decode_source(origin), trust[0]),
        "decode_overhead": _figure(round(decode.overhead_ms, 2), "ms", overhead_source, trust[0]),
        "prefill_efficiency": _figure(round(prefill, 2), "1", _prefill_source(origin), trust[1]),
    }


def _figure(value: float, unit: str, source: str, confidence: Confidence) -> HardwareFigure:
    return HardwareFigure(value=value, unit=unit, source=source, confidence=confidence)


def _same_module(profile: str, origin: Origin) -> bool:
    """Returns whether a profile has the memory and the bandwidth of the device with points."""
    own, other = load_profile(profile), load_profile(origin.profile)
    return (own.memory, own.bandwidth) == (other.memory, other.bandwidth)


def _decode_source(origin: Origin | None) -> str:
    """Returns the source of a profile's decode figures, with the worst errors of the fit."""
    if origin is None:
        worst = max(abs(error) for label, o in ORIGINS.items() if o.shared is None for error in _exchange_errors(label))
        return (
            f"default, no points of this device: mean of the fits of {WITH_BOTH}, published decode figures of "
            f"{RUNTIME}; one of them predicts the other's points within {percent(worst)}"
        )
    shared = f", given {origin.shared}'s overhead" if origin.shared else ""
    remark = f"; {origin.remark}" if origin.remark else ""
    return (
        f"fit of published decode figures, {RUNTIME}: {_models(origin)} on {origin.label}, {SETTING}, past 2048"
        f"{shared}; worst error {percent(max(map(abs, fit_errors(origin))))}, "
        f"{percent(max(map(abs, left_out_errors(origin))))} for a point left out{remark}"
    )


def _prefill_source(origin: Origin | None) -> str:
    """Returns the source of a profile's prefill efficiency, with the range of the points."""
    if origin is None:
        return (
            f"default, no points of this device: mean of the fits of {WITH_BOTH}, published prefill figures of "
            f"{RUNTIME}, 2048 tokens: shares of the dense fp16 peak"
        )
    shares = shares_of(origin)
    peak = f" of {origin.peak}" if origin.peak != origin.profile else ""
    remark = f"; {origin.remark}" if origin.remark else ""
    return (
        f"fit of published prefill figures, {RUNTIME}: {_models(origin)} on {origin.label}, {SETTING}, 2048 tokens, "
        f"which reached {min(shares):.2f} to {max(shares):.2f} of the dense fp16 peak{peak}{remark}"
    )


def _models(origin: Origin) -> str:
    first, *rest = (point.model for point in origin.points)
    return ", ".join([first, *(model.removeprefix("Qwen3-") for model in rest)])


def _bandwidth(origin: Origin) -> float:
    return load_profile(origin.profile).bandwidth.si


def fit_errors(origin: Origin) -> list[float]:
    """Returns the relative error of the fit at each point."""
    return [fit_of(origin.label)[0].error(point, _bandwidth(origin)) for point in origin.points]


def left_out_errors(origin: Origin) -> list[float]:
    """Returns the relative error at each point of a fit without it."""
    shared = fit_of(origin.shared)[0].overhead_ms if origin.shared else None
    return leave_one_out(origin.points, _bandwidth(origin), shared)


def shares_of(origin: Origin) -> list[float]:
    """Returns the share of the dense fp16 peak that the prefill of each point reached."""
    peak, (decode, _) = load_profile(origin.peak).fp16_compute.si, fit_of(origin.label)
    return [prefill_share(point, peak, decode.overhead_ms) for point in origin.points]


def _exchange_errors(label: str) -> list[float]:
    """Returns the errors that the default would have on a device, had it no points."""
    fit, _ = default_fit(without=label)
    return [fit.error(point, _bandwidth(ORIGINS[label])) for point in ORIGINS[label].points]


def percent(share: float, sign: str = "") -> str:
    """Returns a share in percent."""
    return f"{100 * share:{sign}.1f} %"


def fill_profile(text: str, figures: dict[str, HardwareFigure]) -> str:
    """Returns a profile's file with these figures; all else, comments too, stays as it is.

    Raises ValueError where a figure's table does not stand in the file exactly once.
    """
    for name, figure in figures.items():
        lines = (
            f"[{name}]",
            f"value = {figure.value:g}",
            f"unit = {json.dumps(figure.unit)}",
            f"source = {json.dumps(figure.source)}",
            f"confidence = {json.dumps(figure.confidence)}",
        )
        block = "\n".join(lines) + "\n"
        text, count = re.subn(rf"^\[{name}\]\n(?:\w+ = .*\n)+", lambda _, block=block: block, text, flags=re.MULTILINE)
        if count != 1:
            raise ValueError(f"[{name}] stands {count} times in the profile")
    return text


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def write_fits() -> str:
    """Returns the table of the fits and the profiles that take them."""
    rows = []
    for label, origin in ORIGINS.items():
        decode, prefill = fit_of(label)
        shared = f" (of {origin.shared})" if origin.shared else ""
        rows.append(
            [
                label,
                ", ".join((origin.profile, *origin.others)),
                f"{decode.efficiency:.3f}",
                f"{decode.overhead_ms:.2f} ms{shared}",
                f"{prefill:.2f}",
            ]
        )
    decode, prefill = default_fit()
    rows.append(["default", "all others", f"{decode.efficiency:.3f}", f"{decode.overhead_ms:.2f} ms", f"{prefill:.2f}"])
    return _table(["points of", "profiles", "decode efficiency", "decode overhead", "prefill efficiency"], rows)


def write_decode() -> str:
    """Returns the table of published decode figures against the fit."""
    header = ["device", "model", "GB per step", "published tokens/s", "published", "fit", "error", "error, left out"]
    return _table(
        header,
        [
            [
                label,
                point.model,
                f"{point.decode_bytes / 1e9:.3f}",
                f"{1e3 / point.decode_ms:.1f}",
                f"{point.decode_ms:.2f} ms",
                f"{fit_of(label)[0].decode_ms(point, _bandwidth(origin)):.2f} ms",
                percent(error, "+"),
                percent(out, "+"),
            ]
            for label, origin in ORIGINS.items()
            for point, error, out in zip(origin.points, fit_errors(origin), left_out_errors(origin), strict=True)
        ],
    )


def write_default() -> str:
    """Returns the table of the default's errors on devices with points."""
    rows = []
    for label, origin in ORIGINS.items():
        rests = " and ".join(other for other, o in ORIGINS.items() if o.shared is None and other != label)
        models = (point.model for point in origin.points)
        errors = ", ".join(
            f"{model} {percent(error, '+')}" for model, error in zip(models, _exchange_errors(label), strict=True)
        )
        rows.append([label, rests, errors])
    return _table(["device, as if it had no points", "default from", "error of decode"], rows)


def write_prefill() -> str:
    """Returns the table of published prefill figures against the fit."""
    rows = []
    for label, origin in ORIGINS.items():
        (decode, fitted), peak = fit_of(label), load_profile(origin.peak).fp16_compute
        for point, share in zip(origin.points, shares_of(origin), strict=True):
            predicted = 1e3 * point.prefill_flops / (fitted * peak.si) + decode.overhead_ms
            rows.append(
                [
                    label,
                    point.model,
                    f"{point.prefill_flops / 1e12:.2f} TFLOP",
                    f"{point.prefill_ms:g} ms",
                    f"{share:.2f} of {peak.value:g} {peak.unit}",
                    f"{predicted:.0f} ms",
                    percent(predicted / point.prefill_ms - 1, "+"),
                ]
            )
    return _table(["device", "model", "work", "published", "reached", "fit", "error"], rows)


WRITERS: dict[str, Callable[[], str]] = {
    "fits": write_fits,
    "decode": write_decode,
    "default": write_default,
    "prefill": write_prefill,
}


def fill(page: str) -> str:
    """Returns the page with its tables computed anew."""
    return filled(page, {name: write() for name, write in WRITERS.items()})


def main() -> None:
    """Writes the figures into the profiles that hold hardware figures, and the tables into the page."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for profile in list_profiles():
        if profile.is_probed:
            path = profiles_folder() / f"{profile.name}.toml"
            path.write_text(fill_profile(path.read_text(encoding="utf-8"), figures_of(profile.name)), encoding="utf-8")
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
