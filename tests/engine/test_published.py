"""The fit: published points left out one by one, the figures of every profile, and points made to order."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.engine.estimate import bytes_per_token, estimate_performance
from edgeprune.engine.published import (
    AWQ,
    ORIGINS,
    QWEN3,
    WORKLOAD,
    DecodeFit,
    PublishedPoint,
    default_fit,
    fit_decode,
    fit_of,
    fit_prefill,
    leave_one_out,
    prefill_share,
)
from edgeprune.errors import InputError
from edgeprune.ondevice.figures import Workload
from edgeprune.precision import WEIGHT_FORMATS
from edgeprune.profiles import DeviceProfile, list_profiles, load_profile

PROFILES = [profile for profile in list_profiles() if profile.is_probed]
POINTS = [(label, index) for label, origin in ORIGINS.items() for index in range(len(origin.points))]
OWN = ("AGX Orin 64 GB", "Orin NX 16 GB")  # with an efficiency and an overhead of their own
NANO = ORIGINS["Orin Nano 8 GB"]


def bandwidth(label: str) -> float:
    return load_profile(ORIGINS[label].profile).bandwidth.si


def estimated(point: PublishedPoint, profile: DeviceProfile, fit: DecodeFit) -> float:
    """Decode in ms by the product's own way, with these figures and a cache in place, as the runtime of the points."""
    figures = {
        "decode_efficiency": profile.decode_efficiency.model_copy(update={"value": fit.efficiency}),
        "decode_overhead": profile.decode_overhead.model_copy(update={"value": fit.overhead_ms}),
        "dialect": "onnxruntime",
    }
    changed = profile.model_copy(update=figures)
    return estimate_performance(point.decoder, changed, point.workload, point.precision).decode.value


@pytest.mark.parametrize(("label", "index"), [point for point in POINTS if point[0] in OWN])
def test_a_point_left_out_is_predicted_within_4_percent(label: str, index: int) -> None:
    points = list(ORIGINS[label].points)
    point = points.pop(index)
    fit = fit_decode(points, bandwidth(label))
    decode = estimated(point, load_profile(ORIGINS[label].profile), fit)
    assert decode == pytest.approx(point.decode_ms, rel=0.04)
    error = leave_one_out(ORIGINS[label].points, bandwidth(label))[index]
    assert error == pytest.approx(decode / point.decode_ms - 1)


def test_the_nano_with_the_overhead_of_the_nx() -> None:
    fit, _ = fit_of(NANO.label)
    assert fit.overhead_ms == fit_of("Orin NX 16 GB")[0].overhead_ms
    errors = [fit.error(point, bandwidth(NANO.label)) for point in NANO.points]
    assert max(map(abs, errors)) < 0.015
    assert max(map(abs, leave_one_out(NANO.points, bandwidth(NANO.label), fit.overhead_ms))) < 0.03


@pytest.mark.parametrize(("label", "index"), POINTS)
def test_the_shipped_profiles_agree_with_the_published_decode(label: str, index: int) -> None:
    point, profile = ORIGINS[label].points[index], load_profile(ORIGINS[label].profile)
    shipped = DecodeFit(profile.decode_efficiency.value, profile.decode_overhead.value)
    assert estimated(point, profile, shipped) == pytest.approx(point.decode_ms, rel=0.015)


@pytest.mark.parametrize(("label", "index"), POINTS)
def test_the_published_prefill_is_reached_within_10_percent(label: str, index: int) -> None:
    origin, profile = ORIGINS[label], load_profile(ORIGINS[label].peak)
    point, (decode, share) = origin.points[index], fit_of(label)
    prefill = estimate_performance(point.decoder, profile, point.workload, "fp16").prefill.value
    assert prefill == pytest.approx(point.prefill_ms, rel=0.11)
    reached = prefill_share(point, profile.fp16_compute.si, decode.overhead_ms)
    assert 0.45 <= round(reached, 2) <= (0.61 if origin is NANO else 0.53)  # as docs/estimates.md says
    assert reached == pytest.approx(share, rel=0.11)


@pytest.mark.parametrize("model", QWEN3)
def test_the_published_bytes_by_hand(model: str) -> None:
    """0.5 + 2/128 byte for a linear weight, an fp16 head, the cache read once: the same sum written out."""
    decoder = QWEN3[model].with_format(AWQ)
    attention, mlp = decoder.layers[0].attention, decoder.layers[0].mlp
    linear = (
        len(decoder.layers)
        * decoder.hidden_size
        * (2 * attention.query_size + 2 * attention.key_value_size + 3 * mlp.intermediate_size)
    )
    moved = linear * (0.5 + 2 / 128) + 2 * 151936 * decoder.hidden_size + len(decoder.layers) * 4096 * 2049
    assert bytes_per_token(decoder, "fp16", WORKLOAD, in_place=True).total == pytest.approx(moved, rel=1e-3)


def test_the_models_are_those_published() -> None:
    billions = {model: round(decoder.parameters / 1e9, 2) for model, decoder in QWEN3.items()}
    assert billions == {"Qwen3-0.6B": 0.6, "Qwen3-1.7B": 1.72, "Qwen3-4B": 4.02, "Qwen3-8B": 8.19}


@pytest.mark.parametrize("profile", PROFILES, ids=lambda profile: profile.name)
def test_the_figures_of_every_profile_are_the_fit(profile: DeviceProfile) -> None:
    origins = [o for o in ORIGINS.values() if profile.name in (o.profile, *o.others)]
    assert len(origins) <= 1
    decode, prefill = fit_of(origins[0].label) if origins else default_fit()
    assert profile.decode_efficiency.value == round(decode.efficiency, 3)
    assert profile.decode_overhead.value == round(decode.overhead_ms, 2)
    assert profile.prefill_efficiency.value == round(prefill, 2)
    for figure in (profile.decode_efficiency, profile.decode_overhead, profile.prefill_efficiency):
        assert "TensorRT-Edge-LLM 0.10" in figure.source
        assert all(origin.label in figure.source or origin.shared in figure.source for origin in origins)
        assert origins or figure.source.startswith("default, no points of this device: mean of the fits of AGX Orin")


def test_every_orin_has_the_figures_of_its_module() -> None:
    named = {name for origin in ORIGINS.values() for name in (origin.profile, *origin.others)}
    assert named == {profile.name for profile in PROFILES if "orin" in profile.name}


def test_the_default_is_the_mean_of_the_devices_with_both_figures() -> None:
    (decode, prefill), fits = default_fit(), [fit_of(label) for label in OWN]
    assert decode.efficiency == pytest.approx(sum(fit.efficiency for fit, _ in fits) / 2)
    assert decode.overhead_ms == pytest.approx(sum(fit.overhead_ms for fit, _ in fits) / 2)
    assert prefill == pytest.approx(sum(share for _, share in fits) / 2)
    assert default_fit(without=OWN[0]) == fits[1]


FIGURES = {"efficiency": st.floats(0.05, 1.0), "overhead": st.floats(0.0, 20.0), "speed": st.floats(1e10, 4e12)}


def made(decode: DecodeFit, share: float, speed: float, in_place: bool = True) -> list[PublishedPoint]:
    """Points that a device of these figures would have; its peak rate is 100 FLOP for each byte of bandwidth."""
    points = [
        PublishedPoint(model, decoder.with_format(form), "fp16", Workload(1, 512, 1024), 1.0, 1.0, in_place)
        for (model, decoder), form in zip(QWEN3.items(), (None, AWQ, WEIGHT_FORMATS["int8"], None), strict=True)
    ]
    return [
        replace(
            point,
            decode_ms=decode.decode_ms(point, speed),
            prefill_ms=1e3 * point.prefill_flops / (share * 100 * speed) + decode.overhead_ms,
        )
        for point in points
    ]


@given(**FIGURES, share=st.floats(0.05, 1.0), in_place=st.booleans())
def test_a_fit_finds_the_figures_again(
    efficiency: float, overhead: float, speed: float, share: float, in_place: bool
) -> None:
    points = made(DecodeFit(efficiency, overhead), share, speed, in_place)
    fit = fit_decode(points, speed)
    for point, out in zip(points, leave_one_out(points, speed), strict=True):
        assert fit.error(point, speed) == pytest.approx(0, abs=1e-6)
        assert out == pytest.approx(0, abs=1e-5)
    assert fit_decode(points[:1], speed, overhead).efficiency == pytest.approx(efficiency, rel=1e-6)
    assert fit_prefill(points, 100 * speed, overhead) == pytest.approx(share, rel=1e-6)


@given(**FIGURES, noise=st.lists(st.floats(-0.03, 0.03), min_size=4, max_size=4))
def test_no_other_figures_fit_better(efficiency: float, overhead: float, speed: float, noise: list[float]) -> None:
    points = [
        replace(point, decode_ms=point.decode_ms * (1 + error))
        for point, error in zip(made(DecodeFit(efficiency, overhead), 0.5, speed), noise, strict=True)
    ]

    def loss(fit: DecodeFit) -> float:
        return sum(fit.error(point, speed) ** 2 for point in points)

    try:
        best = fit_decode(points, speed)
    except InputError:  # the noise asks for more than the whole bandwidth, or for less than no overhead
        return
    if best.efficiency == 1 or best.overhead_ms == 0:  # a bound, not the best
        return
    for factor in (0.99, 1.01):
        assert loss(best) <= loss(replace(best, efficiency=best.efficiency * factor)) + 1e-12
        assert loss(best) <= loss(replace(best, overhead_ms=best.overhead_ms * factor)) + 1e-12


def test_points_that_say_nothing_or_too_much_are_refused() -> None:
    points = ORIGINS[OWN[0]].points
    for few in (points[:1], (points[0], points[0])):
        with pytest.raises(InputError, match="do not determine 2 figures"):
            fit_decode(few, 204.8e9)
    with pytest.raises(InputError, match="do not determine 1 figures"):
        fit_decode([], 204.8e9, 1.0)
    with pytest.raises(InputError, match="efficiency of 1.59"):
        fit_decode(points, 102.4e9)
    falling = [replace(points[0], decode_ms=30.0), replace(points[3], decode_ms=300.0)]
    with pytest.raises(InputError, match="overhead of -"):
        fit_decode(falling, 204.8e9)
