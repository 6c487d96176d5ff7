"""The fits, on points that were made to order: devices and runtimes with known figures."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.engine.fits import (
    OTHER,
    TENSORRT,
    DecodeFit,
    PrefillFit,
    fit_decode,
    fit_discrete,
    fit_prefill,
    fit_siblings,
    leave_one_out,
)
from edgeprune.engine.published import PublishedPoint, decoder_of
from edgeprune.errors import InputError

SIZES = {
    "small": (1024, 28, 16, 3072),
    "medium": (2048, 28, 16, 6144),
    "deep": (2560, 36, 32, 9728),
    "large": (4096, 32, 32, 12288),
}
SPEED, PEAK = 200e9, 40e12


def point(name: str, precision: str = "int4_awq", device: str = "made", runtime: str = "vllm") -> PublishedPoint:
    hidden, layers, heads, intermediate = SIZES[name]
    sizes = {"hidden_size": hidden, "layers": layers, "heads": heads, "intermediate_size": intermediate}
    sizes |= {"kv_heads": 8, "head_dim": 128, "vocab_size": 150000, "tied": False, "gated_mlp": True}
    decoder = decoder_of(sizes)
    size = 0.5 if precision == "int4_awq" else 2.0
    weights = size * decoder.layer_parameters + 2 * decoder.vocab_size * hidden
    return PublishedPoint(device, SPEED, runtime, runtime, precision, name, decoder, weights, past=1000, prompt=2048)


def decoded(points: list[PublishedPoint], fit: DecodeFit) -> list[PublishedPoint]:
    """The points with the latencies that a device of these figures has."""
    return [replace(one, decode_ms=fit.decode_ms(one)) for one in points]


def prefilled(points: list[PublishedPoint], fit: PrefillFit) -> list[PublishedPoint]:
    return [replace(one, prefill_ms=fit.prefill_ms(one)) for one in points]


EFFICIENCY, OVERHEAD = st.floats(0.05, 1.0), st.floats(0.0, 0.5)


@given(efficiency=EFFICIENCY, of_int4=EFFICIENCY, overhead=OVERHEAD)
def test_a_fit_finds_the_figures_of_decode_again(efficiency: float, of_int4: float, overhead: float) -> None:
    made = DecodeFit({OTHER: efficiency, "int4": of_int4}, overhead)
    points = decoded([point(name, form) for name in SIZES for form in ("int4_awq", "fp16")], made)
    fit = fit_decode(points, own=("int4",))
    assert fit.efficiencies == pytest.approx(made.efficiencies, rel=1e-4)
    assert fit.layer_overhead_ms == pytest.approx(overhead, abs=1e-4)
    errors = leave_one_out(points, lambda some: fit_decode(some, ("int4",)).decode_ms, "decode")
    assert errors == pytest.approx([0] * 8, abs=1e-4)
    given_overhead = fit_decode(points[:2], ("int4",), overhead)
    assert given_overhead.efficiencies == pytest.approx(made.efficiencies, rel=1e-4)


def test_no_other_figures_fit_decode_better() -> None:
    noise = (0.02, -0.03, 0.01, -0.01)
    points = decoded([point(name) for name in SIZES], DecodeFit({OTHER: 0.7}, 0.05))
    points = [replace(one, decode_ms=one.decode_ms * (1 + error)) for one, error in zip(points, noise, strict=True)]

    def loss(fit: DecodeFit) -> float:
        return sum((fit.decode_ms(one) / one.decode_ms - 1) ** 2 for one in points)

    best = fit_decode(points)
    for factor in (0.99, 1.01):
        assert loss(best) < loss(replace(best, layer_overhead_ms=factor * best.layer_overhead_ms))
        assert loss(best) < loss(replace(best, efficiencies={OTHER: factor * best.efficiencies[OTHER]}))


def test_efficiencies_and_overheads_keep_to_their_bounds() -> None:
    faster = decoded([point(name) for name in SIZES], DecodeFit({OTHER: 1.5}, 0.05))
    assert fit_decode(faster).efficiencies[OTHER] == pytest.approx(1)
    points = decoded([point(name) for name in ("small", "large")], DecodeFit({OTHER: 0.5}, 0.0))
    steep = [replace(points[0], decode_ms=0.5 * points[0].decode_ms), points[1]]
    assert fit_decode(steep).layer_overhead_ms == pytest.approx(0, abs=1e-6)


@given(efficiency=EFFICIENCY, overheads=st.tuples(OVERHEAD, OVERHEAD))
def test_siblings_share_the_efficiency(efficiency: float, overheads: tuple[float, float]) -> None:
    points = [
        one
        for device, overhead in zip(("first", "second"), overheads, strict=True)
        for one in decoded(
            [point(name, device=device) for name in ("small", "large")], DecodeFit({OTHER: efficiency}, overhead)
        )
    ]
    fits = fit_siblings(points, "first")
    for first, overhead in zip((True, False), overheads, strict=True):
        assert fits[first].efficiencies[OTHER] == pytest.approx(efficiency, rel=1e-3)
        assert fits[first].layer_overhead_ms == pytest.approx(overhead, abs=1e-3)


@pytest.mark.slow
@given(share=st.floats(0.05, 1.6), tokens=st.floats(0, 2000), constant=st.floats(0, 10), layer=OVERHEAD)
def test_a_fit_finds_the_figures_of_prefill_again(share: float, tokens: float, constant: float, layer: float) -> None:
    """A time for each token from one length of prompt, a constant from several, the share alone from two points."""
    points, made = [point(name) for name in SIZES], PrefillFit(share, share, PEAK, layer)
    one_length = fit_prefill(prefilled(points, replace(made, token_overhead_ns=tokens)), PEAK, layer)
    assert one_length.share == one_length.float_share == pytest.approx(share, rel=1e-3)
    assert one_length.token_overhead_ns == pytest.approx(tokens, abs=1)
    assert one_length.overhead_ms == 0
    lengths = [replace(one, prompt=prompt) for one in points for prompt in (128, 2048)]
    several = fit_prefill(prefilled(lengths, replace(made, overhead_ms=constant)), PEAK, layer)
    assert several.share == pytest.approx(share, rel=1e-3)
    assert several.overhead_ms == pytest.approx(constant, abs=1e-2)
    assert several.token_overhead_ns == 0
    two = fit_prefill(prefilled(points[:2], made), PEAK, layer)
    assert two == replace(made, share=pytest.approx(share), float_share=pytest.approx(share))


def test_floats_beside_a_format_have_a_share_that_is_known_or_a_ratio() -> None:
    points, made = [point(name) for name in SIZES], PrefillFit(1.2, 0.4, PEAK, 0.05, token_overhead_ns=150)
    known = fit_prefill(prefilled(points, made), PEAK, 0.05, float_share=0.4)
    assert (known.share, known.float_share) == (pytest.approx(1.2), 0.4)
    ratio = fit_prefill(prefilled(points, replace(made, float_share=0.6)), PEAK, 0.05, float_ratio=0.5)
    assert (ratio.share, ratio.float_share) == pytest.approx((1.2, 0.6))


def test_points_that_determine_nothing_are_refused() -> None:
    points = decoded([point("small"), point("small")], DecodeFit({OTHER: 0.5}, 0.1))
    with pytest.raises(InputError, match="2 points do not determine 2 figures"):
        fit_decode(points)
    with pytest.raises(InputError, match="1 points do not determine 2 figures"):
        fit_decode(points[:1])


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 99))
def test_the_fit_over_discrete_gpus_tells_devices_from_runtimes(seed: int) -> None:
    """Every runtime on most devices, within the spreads that the fit assumes, a hundredth of noise."""
    generator = np.random.default_rng(seed)
    devices = {f"gpu{index}": float(generator.uniform(0.68, 0.85)) for index in range(6)}
    runtimes = {"tensorrt-llm": (1.0, 0.04), "exllamav2": (0.9, 0.04), "llama.cpp-2026": (0.85, 0.06)}
    points = []
    for device, efficiency in devices.items():
        for runtime, (factor, overhead) in runtimes.items():
            some = [point(name, device=device, runtime=runtime) for name in SIZES]
            points += decoded(some, DecodeFit({OTHER: efficiency * factor}, overhead))
    points = [replace(one, decode_ms=one.decode_ms * float(generator.normal(1, 0.01))) for one in points]
    fit = fit_discrete(points)
    assert fit.efficiencies == pytest.approx(devices, rel=0.05)
    assert fit.factors["ExLlamaV2"] == pytest.approx(0.9, rel=0.05)
    assert fit.overheads[TENSORRT] == pytest.approx(0.04, rel=0.15)
    assert max(abs(fit.decode_ms(one) / one.decode_ms - 1) for one in points) < 0.05
    assert fit.of("gpu0").efficiencies[OTHER] == fit.efficiencies["gpu0"]
    assert fit.of(None).efficiencies[OTHER] == fit.mean


def test_one_point_is_not_taken_at_its_word_and_none_beats_the_bandwidth() -> None:
    devices = {"fast": 1.4, "gpu1": 0.8, "gpu2": 0.8, "gpu3": 0.8}
    points = [
        one
        for device, efficiency in devices.items()
        for one in decoded(
            [point("large", device=device, runtime="tensorrt-llm")], DecodeFit({OTHER: efficiency}, 0.04)
        )
    ]
    fit = fit_discrete(points)
    assert fit.efficiencies["fast"] <= 0.95
    assert fit.mean < fit.efficiencies["fast"]
