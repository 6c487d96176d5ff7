"""What the profiles rest on: every point left out in turn, and the estimator on the published points."""

from __future__ import annotations

import pytest

from edgeprune.engine.calibration import (
    DISCRETE,
    FIRST_TOKENS,
    ORIGINS,
    decode_errors,
    decode_fit,
    decode_points,
    discrete_points,
    leave_sizes_out,
    overhead_ratio,
    prefill_errors,
    prefill_figures,
    prefill_points,
)
from edgeprune.engine.estimate import estimate_performance
from edgeprune.engine.fits import OTHER, fit_decode, leave_one_out
from edgeprune.engine.published import PublishedPoint
from edgeprune.ondevice.figures import Workload
from edgeprune.precision import WeightFormat
from edgeprune.profiles import list_profiles, load_profile

NVIDIA = [device for device, origin in ORIGINS.items() if origin.sibling is None]
THREE_OR_MORE = [device for device in NVIDIA if len(decode_points(device)) > 2]
OTHERS = [device for device in ORIGINS if device not in THREE_OR_MORE]
DISCRETE_DEVICES = sorted({point.device for point in discrete_points()})
PREFILL = [*NVIDIA, *FIRST_TOKENS]
ALONE = "RTX A2000"  # whose only point leaves nothing of the device when it is left out
FORMATS = {"int4": WeightFormat("int4-128", 4, 128), "nvfp4": WeightFormat("nvfp4", 4, 32), "float": None}
# nvfp4 has a scale of one byte for 16 weights: the same bytes as two for 32.


def test_who_has_points_of_nvidias_runtimes() -> None:
    assert THREE_OR_MORE == ["AGX Orin 64 GB", "Orin NX 16 GB", "AGX Thor", "DGX Spark (GB10)"]
    assert [len(decode_points(device)) for device in NVIDIA] == [12, 7, 2, 9, 12]
    assert len(discrete_points()) == 61


@pytest.mark.parametrize("device", THREE_OR_MORE)
def test_decode_left_out_is_within_6_percent(device: str) -> None:
    errors = [out for _, _, out in decode_errors(device)]
    assert max(map(abs, errors)) <= 0.06
    # By hand: the first point, by a fit of the others.
    first, *others = decode_points(device)
    fit = fit_decode(others, ORIGINS[device].own)
    assert errors[0] == pytest.approx(fit.decode_ms(first) / first.decode_ms - 1)
    assert max(map(abs, leave_sizes_out(device, "decode"))) <= 0.06  # twins do not carry it


@pytest.mark.parametrize("device", [*OTHERS, *DISCRETE_DEVICES])
def test_decode_left_out_is_within_15_percent_elsewhere(device: str) -> None:
    errors = [out for _, _, out in decode_errors(device)]
    if device == ALONE:
        assert len(errors) == 1
        assert abs(decode_errors(device)[0][1]) < 0.15
    else:
        assert max(map(abs, errors)) <= 0.15


@pytest.mark.parametrize("device", PREFILL)
def test_prefill_left_out_is_within_20_percent(device: str) -> None:
    errors = [out for _, _, out in prefill_errors(device)]
    assert len(errors) == len(prefill_points(device)) > 1
    assert max(map(abs, errors)) <= 0.2


def test_int4_has_an_efficiency_of_its_own_on_agx_orin_alone() -> None:
    """There it keeps points left out within 6 %; one efficiency for all formats does not."""
    points = decode_points("AGX Orin 64 GB")
    together = leave_one_out(points, lambda some: fit_decode(some).decode_ms, "decode")
    assert max(map(abs, together)) > 0.06
    assert [device for device in ORIGINS if len(decode_fit(device).efficiencies) > 1] == ["AGX Orin 64 GB"]


def test_a_module_without_points_of_tensorrt_has_the_efficiency_of_its_sibling() -> None:
    for device, origin in ORIGINS.items():
        if origin.sibling is not None:
            fit, known = decode_fit(device), decode_fit(origin.sibling[0])
            assert fit.efficiencies == known.efficiencies
            assert fit.layer_overhead_ms == pytest.approx(known.layer_overhead_ms * overhead_ratio(device))
    assert overhead_ratio("Thor T4000") > 1 > overhead_ratio("Orin Nano 8 GB Super")


def test_prefill_of_formats() -> None:
    """FP8 and NVFP4 have shares of their own; products of floats have half of FP8's, and the Orins' beside NVFP4."""
    assert prefill_figures("h100-sxm").share == pytest.approx(prefill_figures("h100-sxm").of_format["fp8"] / 2)
    thor = prefill_figures("jetson-thor")
    assert thor.of_format["nvfp4"] > 1 > thor.share
    assert (
        prefill_figures("jetson-thor-t4000") == prefill_figures("jetson-thor")
        or not prefill_figures("jetson-thor-t4000").own
    )
    assert prefill_figures("jetson-orin").of_format == {}


def test_every_profile_is_calibrated_once() -> None:
    names = [profile for origin in ORIGINS.values() for profile in origin.profiles] + list(DISCRETE)
    assert sorted(names) == sorted(profile.name for profile in list_profiles() if profile.is_probed)
    taken = [profile for profiles in FIRST_TOKENS.values() for profile in profiles]
    assert len(taken) == len(set(taken))
    assert set(taken) < set(DISCRETE)
    assert {device for device in DISCRETE.values() if device} < set(DISCRETE_DEVICES)


CHECKED = [
    (device, kind, index)
    for kind, of in (("decode", decode_points), ("prefill", prefill_points))
    for device in NVIDIA
    for index, point in enumerate(of(device))
    if point.family in FORMATS
]


@pytest.mark.parametrize(("device", "kind", "index"), CHECKED)
def test_the_estimator_with_the_shipped_profile_says_what_the_fit_says(device: str, kind: str, index: int) -> None:
    """The product's own way, with a cache in place as the points' runtimes have."""
    point: PublishedPoint = (decode_points if kind == "decode" else prefill_points)(device)[index]
    origin = ORIGINS[device]
    profile = load_profile((origin.peak if kind == "prefill" else None) or origin.profiles[0])
    profile = profile.model_copy(update={"dialect": "onnxruntime"})
    decoder = point.decoder.with_format(FORMATS[point.family])
    context = 1 + (point.past if kind == "decode" else point.prompt)
    performance = estimate_performance(decoder, profile, Workload(1, point.prompt or 1, context), "fp16")
    _, error, _ = (decode_errors if kind == "decode" else prefill_errors)(device)[index]
    published = getattr(point, f"{kind}_ms")
    assert getattr(performance, kind).value / published - 1 == pytest.approx(error, abs=0.005)
    assert device in getattr(performance, kind).basis


def test_efficiencies_are_shares() -> None:
    for device in (*ORIGINS, *DISCRETE.values()):
        fit = decode_fit(device)
        assert OTHER in fit.efficiencies
        assert all(0.3 < efficiency <= 1 for efficiency in fit.efficiencies.values())
        assert 0 < fit.layer_overhead_ms < 0.2
