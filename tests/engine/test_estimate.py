import pytest

from edgeprune.engine.base import Workload
from edgeprune.engine.estimate import (
    bytes_per_second, decode_bytes, decode_shares, estimate_performance, floor_decoder, prefill_flops,
)
from edgeprune.model.decoder import Attention, Decoder, Layer, Mlp, Rotary
from edgeprune.profiles import load_profile

SMOLLM2 = Decoder(
    "llama", 576, 49152, 8192, 1e-5, True, Rotary((1.0,) * 32), (Layer(Attention(9, 3, 64), Mlp(1536)),) * 30
)
WORKLOAD = Workload(1, 512, 2048)

QWEN3 = {  # hidden, layers, heads, key/value heads, intermediate; head_dim 128, vocabulary 151936
    "0.6B": (1024, 28, 16, 8, 3072), "1.7B": (2048, 28, 16, 8, 6144),
    "4B": (2560, 36, 32, 8, 9728), "8B": (4096, 36, 32, 8, 12288),
}  # fmt: skip
PUBLISHED = {  # tokens/s at past 2048, INT4, TensorRT-Edge-LLM 0.10
    "jetson-agx-orin-64gb": {"0.6B": 162.5, "1.7B": 89.5, "4B": 50.7, "8B": 30.6},
    "jetson-orin-nx-16gb": {"0.6B": 98.9, "1.7B": 52.2, "4B": 29.2, "8B": 17.5},
}


@pytest.mark.parametrize(("device", "size"), [(d, s) for d, points in PUBLISHED.items() for s in points])
def test_efficiency_and_overhead_reproduce_the_published_decode_figures(device, size):
    """Bytes as that runtime moves them: int4 with scales, fp16 head, the cache read in place."""
    hidden, layers, heads, key_value_heads, intermediate = QWEN3[size]
    decoder = Decoder(
        "qwen3", hidden, 151936, 40960, 1e-6, True, Rotary((1.0,) * 64),
        (Layer(Attention(heads, key_value_heads, 128), Mlp(intermediate)),) * layers,
    )
    moved = decode_bytes(decoder, "fp16", Workload(1, 2048, 2048), in_place=True)
    total = decoder.layer_parameters * (0.5 + 2 / 128) + moved.head + moved.cache
    profile = load_profile(device)
    predicted = total / bytes_per_second(profile) + profile.decode_overhead.si
    assert predicted == pytest.approx(1 / PUBLISHED[device][size], rel=0.04)


def test_weights_cache_and_decode_of_a_known_shape():
    estimate = estimate_performance(SMOLLM2, load_profile("jetson-orin"), WORKLOAD, "fp16")
    assert SMOLLM2.parameters == 134_515_008
    assert estimate.memory.weights.value == pytest.approx(2 * SMOLLM2.parameters, rel=1e-3)
    cache = 2 * 30 * 2 * 3 * 64 * 2048
    assert estimate.memory.cache.value == 2 * cache  # past and present
    expected = (2 * SMOLLM2.parameters + 3 * cache) / (0.8 * 204.8e9) * 1e3 + 1.53
    assert estimate.decode.value == pytest.approx(expected, rel=1e-3)
    assert "AGX Orin" in estimate.decode.basis


def test_prefill_counts_every_matrix_once():
    flops = prefill_flops(SMOLLM2, WORKLOAD)
    matrices = 2 * 512 * SMOLLM2.layer_parameters
    attention = 30 * 9 * (2 * 512 * 512 * 64 * 2) / 2  # two products, half of them masked
    assert flops == pytest.approx(matrices + attention + 2 * 49152 * 576)


def test_shares_add_up_to_the_decode_estimate():
    profile = load_profile("jetson-orin")
    shares = decode_shares(SMOLLM2, profile, WORKLOAD, "fp16")
    assert sum(shares.values()) == pytest.approx(estimate_performance(SMOLLM2, profile, WORKLOAD, "fp16").decode.value)


def test_the_floor_is_below_every_candidate():
    profile = load_profile("jetson-orin")
    floor = floor_decoder(SMOLLM2, 64)
    assert floor.layers[0] == Layer(Attention(1, 1, 64), Mlp(64))
    low, high = (estimate_performance(d, profile, WORKLOAD, "fp16") for d in (floor, SMOLLM2.with_widths(1, 1, 128)))
    assert low.memory.total < high.memory.total
    assert low.decode.value < high.decode.value


def test_everything_is_labelled_an_estimate():
    performance = estimate_performance(SMOLLM2, load_profile("l4"), WORKLOAD, "fp16")
    figures = [performance.prefill, performance.decode, *performance.memory.parts.values()]
    assert {figure.source for figure in figures} == {"estimated"}
    assert all(figure.basis for figure in figures)
