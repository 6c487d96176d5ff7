"""The figures of profiles/*.toml and the tables of docs/estimates.md, computed from the published points.

    python -m tools.estimates

Seconds; it changes nothing where all is up to date. The points are edgeprune/engine/published.json, the fits are
edgeprune/engine/fits.py, which profile takes which is edgeprune/engine/calibration.py.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from edgeprune.engine.calibration import (
    DISCRETE,
    FIRST_TOKENS,
    ORIGINS,
    Origin,
    decode_errors,
    decode_fit,
    discrete_fit,
    discrete_points,
    float_devices,
    origin_of,
    overhead_ratio,
    prefill_errors,
    prefill_figures,
    same_module,
)
from edgeprune.engine.fits import OTHER, TENSORRT, reads_like
from edgeprune.engine.published import RUNTIMES, PublishedPoint
from edgeprune.profiles import Confidence, HardwareFigure, list_profiles, profiles_folder
from tools.estimate_tables import WRITERS
from tools.pages import filled

PAGE = Path(__file__).parents[1] / "docs" / "estimates.md"
NAMES = (
    "decode_efficiency",
    "decode_overhead",
    "layer_overhead",
    "prefill_efficiency",
    "prefill_overhead",
    "token_overhead",
)
FORMATS = {"int4": "INT4 AWQ", "nvfp4": "NVFP4", "fp8": "FP8", "float": "fp16", "int8": "W8A16"}
Errors = Sequence[tuple[PublishedPoint, float, float]]  # a point, its error, and that of a fit without it
Sources = dict[str, tuple[str, Confidence]]  # by family of formats, and of the overhead


def figures_of(profile: str) -> dict[str, HardwareFigure]:
    """Returns the figures of a profile that are fitted, rounded, each with its source and confidence.

    Those of a format are named as formats.FORMAT.NAME.
    """
    decode, sources = decode_fit(_device_of(profile)), _decode_sources(profile)
    figures = {"layer_overhead": _figure(round(1e3 * decode.layer_overhead_ms, 1), "us", *sources["overhead"])}
    for family, value in decode.efficiencies.items():
        name = "decode_efficiency" if family == OTHER else f"formats.{family}.decode_efficiency"
        figures[name] = _figure(round(value, 3), "1", *sources[family])
    return figures | _prefill(profile)


def _figure(value: float, unit: str, source: str, confidence: Confidence) -> HardwareFigure:
    return HardwareFigure(value=value, unit=unit, source=source, confidence=confidence)


def _device_of(profile: str) -> str | None:
    """Returns the device with points whose decode figures a profile takes."""
    origin = origin_of(profile)
    return DISCRETE[profile] if origin is None else origin.device


def _errors(errors: Errors) -> str:
    """Returns the worst errors of a fit in words."""
    worst, out = max(abs(error) for _, error, _ in errors), max(abs(out) for _, _, out in errors)
    return f"worst error {percent(worst)}, {percent(out)} for a point left out"


def _models(errors: Errors) -> str:
    """Returns the models of points, those of a family together: Qwen3-0.6B, 1.7B, Qwen3-VL-2B."""
    families: dict[str, list[str]] = {}
    for point, _, _ in errors:
        family, _, size = point.model.removesuffix("-2507").removesuffix("-Instruct").rpartition("-")
        sizes = families.setdefault(family, [])
        sizes += [size] if size not in sizes else []
    return ", ".join(f"{family}-{', '.join(sizes)}" for family, sizes in families.items())


def _formats(errors: Errors) -> str:
    return ", ".join(dict.fromkeys(FORMATS[point.family] for point, _, _ in errors))


def _of_family(errors: Errors, family: str) -> Errors:
    return [entry for entry in errors if entry[0].family == family]


def _decode_sources(profile: str) -> Sources:
    """Returns the sources of a profile's efficiencies, by family of formats, and of its overhead."""
    origin = origin_of(profile)
    if origin is None:
        return _discrete_sources(DISCRETE[profile])
    if origin.sibling is not None:
        return _sibling_sources(origin)
    own = same_module(profile, origin.profiles[0])
    trust: Confidence = "low" if origin.overhead_of else "high" if own else "medium"
    errors, remark = decode_errors(origin.device), f"; {origin.remark}" if origin.remark else ""

    def text(of: Errors) -> str:
        given = f", given {origin.overhead_of}'s overhead" if origin.overhead_of else ""
        return (
            f"fit of published decode figures, TensorRT-Edge-LLM, cache in place: {len(of)} points of {_models(of)} on "
            f"{origin.device}, {_formats(of)}, batch 1{given}; {_errors(of)}{remark}"
        )

    # The formats without an efficiency of their own have few points where others have one.
    sources: Sources = {family: (text(_of_family(errors, family)), trust) for family in origin.own}
    others = [entry for entry in errors if entry[0].family not in origin.own]
    sources[OTHER] = text(others), "medium" if origin.own and own else trust
    sources["overhead"] = text(errors), trust
    if origin.overhead_of:
        shared, _ = _decode_sources(ORIGINS[origin.overhead_of].profiles[0])["overhead"]
        sources["overhead"] = f"shared from {origin.overhead_of}: {shared}", trust
    return sources


def _sibling_sources(origin: Origin) -> Sources:
    """Returns the sources of a device whose points are of another runtime than TensorRT."""
    other, runtime_class = origin.sibling
    errors = decode_errors(origin.device)
    sources = _decode_sources(ORIGINS[other].profiles[0])
    same: Sources = {
        family: (f"that of {other}, whose memory it has: {text}", "low") for family, (text, _) in sources.items()
    }
    overhead = (
        f"that of {other} x {overhead_ratio(origin.device):.2f}, as {RUNTIMES[runtime_class]}'s is on both with one "
        f"efficiency: {len(errors)} published points of {_models(errors)} on {origin.device}, {_errors(errors)}"
    )
    return same | {"overhead": (overhead, "low")}


def _discrete_sources(device: str | None) -> Sources:
    """Returns the sources of a discrete GPU; None: one without points."""
    points = discrete_points()
    fit = (
        f"one fit to {len(points)} published decode figures of {len({point.device for point in points})} discrete GPUs"
    )
    overhead = f"TensorRT's for each layer, of {fit}; none of them is of TensorRT for RTX"
    if device is None:
        return {OTHER: (f"no points of this device: the mean device of {fit}", "low"), "overhead": (overhead, "low")}
    errors = decode_errors(device)
    counts = Counter(RUNTIMES[point.runtime_class] for point, _, _ in errors)
    factors = sorted({reads_like(point) for point, _, _ in errors} - {TENSORRT})
    stated = "".join(f", {discrete_fit().factors[name]:.2f} x it for {name}" for name in factors)
    source = (
        f"{fit}, {len(errors)} of them on {device} ({', '.join(f'{name} {count}' for name, count in counts.items())}); "
        f"the efficiency of a runtime is TensorRT's for compiled ones{stated}; none is of TensorRT for RTX; "
        f"{_errors(errors)}"
    )
    compiled = any(reads_like(point) == TENSORRT for point, _, _ in errors)
    trust: Confidence = "medium" if compiled and len(errors) > 2 else "low"
    return {OTHER: (source, trust), "overhead": (overhead, trust)}


def _prefill(profile: str) -> dict[str, HardwareFigure]:
    """Returns the figures of a prefill of a profile."""
    taken = prefill_figures(profile)
    if taken.device not in (*ORIGINS, *FIRST_TOKENS):
        source = f"no points of this device: mean of the shares that products of floats reach on {taken.device}"
        return {"prefill_efficiency": _figure(round(taken.share, 3), "1", source, "low")}
    errors = prefill_errors(taken.device)
    remark = f"; {ORIGINS[taken.device].remark}" if taken.device in ORIGINS and ORIGINS[taken.device].remark else ""
    runtime = RUNTIMES[errors[0][0].runtime_class]
    prompts = " and ".join(str(prompt) for prompt in sorted({point.prompt for point, _, _ in errors}))
    source = (
        f"fit of published prefill figures, {runtime}: {len(errors)} points of {_models(errors)} on {taken.device}, "
        f"{_formats(errors)}, prompts of {prompts}; {_errors(errors)}{remark}"
    )
    trust: Confidence = "medium" if taken.own and not remark else "low"
    floats, float_trust = source, trust
    if "fp8" in taken.of_format:
        floats, float_trust = f"half of what FP8 reaches, whose rate is twice that of fp16: {source}", "low"
    if "nvfp4" in taken.of_format:
        floats, float_trust = (
            (
                f"no points of this device with products of floats: mean share of {' and '.join(float_devices())}; "
                f"published figures of INT4 that are not in the fit are slower: docs/estimates.md"
            ),
            "low",
        )
    figures = {"prefill_efficiency": _figure(round(taken.share, 3), "1", floats, float_trust)}
    for family, share in taken.of_format.items():
        name = f"formats.{family}.prefill_efficiency"
        figures[name] = _figure(round(share, 3), "1", f"share of the fp16 peak: {source}", trust)
    if taken.token_overhead_ns >= 0.5:
        figures["token_overhead"] = _figure(round(taken.token_overhead_ns), "ns", source, trust)
    if taken.overhead_ms >= 0.005:
        figures["prefill_overhead"] = _figure(round(taken.overhead_ms, 2), "ms", source, trust)
    return figures


def percent(share: float, sign: str = "") -> str:
    """Returns a share in percent."""
    return f"{100 * share:{sign}.1f} %"


def fill_profile(text: str, figures: dict[str, HardwareFigure]) -> str:
    """Returns a profile's file with these figures in place of those it has; all else, comments too, stays as it is.

    Raises ValueError where the figures do not stand in the file together, once.
    """
    order = [*NAMES, *sorted(name for name in figures if name.startswith("formats."))]
    blocks = [
        "\n".join(
            (
                f"[{name}]",
                f"value = {figures[name].value:g}",
                f"unit = {json.dumps(figures[name].unit)}",
                f"source = {json.dumps(figures[name].source)}",
                f"confidence = {json.dumps(figures[name].confidence)}\n",
            )
        )
        for name in order
        if name in figures
    ]
    one = rf"\[(?:{'|'.join(NAMES)}|formats\.\w+\.\w+)\]\n(?:\w+ = .*\n)+"
    text, count = re.subn(rf"^{one}(?:\n{one})*", lambda _: "\n".join(blocks), text, flags=re.MULTILINE)
    if count != 1:
        raise ValueError(f"the fitted figures stand in {count} places of the profile")
    return text


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
