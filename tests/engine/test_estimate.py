"""The estimator against the written graph's bytes, counts by hand and TensorRT's compiler."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.engine.estimate import (
    check_precision,
    counted,
    decode_parts,
    estimate_floor,
    estimate_performance,
    floor_decoder,
    latency_shares,
    prefill_parts,
)
from edgeprune.engine.onnx.graph import GraphVariant, write_graphs
from edgeprune.engine.overheads import overhead_ms
from edgeprune.engine.work import activation_bytes, bytes_per_token, decode_flops, prefill_flops, table_bytes
from edgeprune.errors import InputError
from edgeprune.model.decoder import Attention, Decoder, Experts, Layer, Mlp
from edgeprune.ondevice.figures import Workload
from edgeprune.ondevice.tensorrt import shapes
from edgeprune.precision import CACHE_FORMATS, WEIGHT_FORMATS
from edgeprune.profiles import DeviceProfile, HardwareFigure, list_profiles, load_profile
from tests.support.shapes import SMOLLM2, uniform

ORIN = load_profile("jetson-orin")
WORKLOAD = Workload(1, 512, 2048)
READING = ORIN.decode_efficiency.value * 204.8e9  # bytes/s
OVERHEAD = 30 * 1e-3 * ORIN.layer_overhead.value  # ms, of SMOLLM2's layers
INT4_READING = ORIN.formats["int4"].decode_efficiency.value * 204.8e9
RATE = ORIN.prefill_efficiency.value * 42e12  # FLOP/s


def prefill_ms(tokens: int, flops: float, weight_bytes: float) -> float:
    """SMOLLM2's prefill on ORIN, by hand."""
    of_tokens = tokens * 30 * 1e-6 * ORIN.token_overhead.value
    return 1e3 * (flops / RATE + weight_bytes / 204.8e9) + of_tokens + OVERHEAD


def on_processor(profile: DeviceProfile) -> DeviceProfile:
    """The device with ONNX Runtime's graphs."""
    return profile.model_copy(update={"dialect": "onnxruntime"})


def joining(profile: DeviceProfile) -> DeviceProfile:
    """The device with graphs that join past and new tokens, as older releases take them."""
    return profile.model_copy(update={"dialect": "opset23"})


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("dialect", ["opset24", "opset23", "primitive", "onnxruntime"])
def test_weights_are_the_bytes_that_the_graph_stores(tied: bool, precision: str, dialect: str, tmp_path: Path) -> None:
    decoder = replace(uniform(64, 2, (4, 2, 16), 96, 200), tie_word_embeddings=tied)
    weights = {name: torch.zeros(shape) for name, shape in decoder.shapes().items()}
    workload = Workload(1, 32, 64)
    files = write_graphs(decoder, weights, tmp_path, precision, [GraphVariant(dialect, "last")], workload.context)
    profile = ORIN.model_copy(update={"dialect": dialect})
    estimated = estimate_performance(decoder, profile, workload, precision).memory.weights.value
    written = sum(files.data.values())
    assert estimated <= written <= estimated + 4096 * len(weights)  # the files align their tensors
    size = 4 if precision == "fp32" else 2
    tables = 2 * workload.context * decoder.layers[0].attention.head_dim // 2 if dialect == "onnxruntime" else 0
    assert estimated == size * decoder.parameters + (2 if precision == "fp16" else 4) * tables


@pytest.mark.parametrize(
    ("name", "matrix_bytes"), [("int4-32", 0.5 + 2 / 32), ("int4-64", 0.5 + 2 / 64), ("int4-offset", 0.5 + 4 / 64)]
)
def test_weight_formats_shrink_the_matrices_alone(name: str, matrix_bytes: float) -> None:
    formatted = SMOLLM2.with_format(WEIGHT_FORMATS[name])
    half, few = (estimate_performance(decoder, ORIN, WORKLOAD, "fp16") for decoder in (SMOLLM2, formatted))
    saved = (2 - matrix_bytes) * SMOLLM2.layer_parameters
    assert half.memory.weights.value - few.memory.weights.value == saved
    assert half.memory.cache == few.memory.cache
    packed = matrix_bytes * SMOLLM2.layer_parameters
    read = (2 * SMOLLM2.layer_parameters / READING) - packed / INT4_READING
    assert half.decode.value - few.decode.value == pytest.approx(1e3 * read, rel=1e-2)  # norms stay floats
    assert "x for its weight formats" in few.decode.basis
    assert "weight formats" not in half.decode.basis
    assert ORIN.formats["int4"].decode_efficiency.source in few.decode.basis


def test_a_format_takes_its_time_in_a_prefill() -> None:
    """As the profile says: here twice that of floats, for the products of the layers alone."""
    offer = ORIN.weights["int8"].model_copy(update={"prefill": 2.0})
    slow = ORIN.model_copy(update={"weights": {"int8": offer}})
    workload = Workload(1, 2048, 4096)
    floats, few = (
        estimate_performance(decoder, slow, workload, "fp16").prefill
        for decoder in (SMOLLM2, SMOLLM2.with_format(WEIGHT_FORMATS["int8"]))
    )
    saved = 1e3 * (2 - 1) * SMOLLM2.layer_parameters / 204.8e9  # a scale for each output apart
    slower = 1e3 * 2 * 2048 * SMOLLM2.layer_parameters / RATE
    assert few.value - floats.value == pytest.approx(slower - saved, rel=1e-3)
    assert "x for its formats" in few.basis
    assert "weight formats" not in floats.basis


def test_memory_and_decode_of_a_known_shape() -> None:
    estimate = estimate_performance(SMOLLM2, joining(ORIN), WORKLOAD, "fp16")
    assert SMOLLM2.parameters == 134_515_008
    cache = 30 * 2 * 3 * 64 * 2048 * 2
    assert estimate.memory.cache.value == 2 * cache  # past and present
    assert estimate.memory.weights.value == pytest.approx(2 * SMOLLM2.parameters, rel=1e-5)
    assert estimate.memory.buffers.value == 8 * (512 + 512 + 2047 + 512) + 2 * 49152
    assert estimate.memory.runtime.value == ORIN.runtime_memory.si
    expected = 1e3 * (2 * SMOLLM2.parameters + 3 * cache) / READING + OVERHEAD  # the cache is read, copied, written
    assert estimate.decode.value == pytest.approx(expected, rel=1e-9)
    copied = f"{2 * cache / 1e6:.4g} MB of it our graph's copy of the cache"
    read = f"204.8 GB/s x {ORIN.decode_efficiency.value:g}"
    for point in (read, f"{OVERHEAD:.3g} ms", "AGX Orin", "Edge-LLM", copied):
        assert point in estimate.decode.basis


def test_what_the_engine_holds_replaces_the_graphs_bytes() -> None:
    assert estimate_performance(SMOLLM2, ORIN, WORKLOAD, "fp16", 123).memory.weights.value == 123


def test_bytes_per_token_by_part() -> None:
    decoder = replace(
        uniform(64, 1, (4, 2, 16), 96, 200), layers=(Layer(Attention(4, 2, 16), None), Layer(None, Mlp(96)))
    )
    moved = bytes_per_token(decoder, "fp16", Workload(3, 8, 32))
    assert moved.layers == 2 * (64 + 64 * (64 + 32 + 32 + 64) + 64 + 3 * 64 * 96)
    assert moved.head == 2 * (200 * 64 + 64)
    assert moved.cache == 3 * 2 * (2 * 2 * 16) * 32  # one layer has attention
    assert moved.cache_copies == 2 * moved.cache
    assert bytes_per_token(decoder, "fp16", Workload(3, 8, 32), in_place=True) == replace(moved, cache_copies=0)


def test_onnx_runtimes_cache_has_zeros_behind_odd_heads() -> None:
    """Of 20 dimensions 24: as counted, as estimated, and as the graph's inputs say (test_graph.py)."""
    decoder, workload = uniform(80, 2, (4, 2, 20), 96, 200), Workload(3, 8, 32)
    held = 2 * 3 * 32 * 2 * 2 * 24
    assert counted(decoder, "fp32", workload).cache == 4 * held
    assert estimate_performance(decoder, on_processor(ORIN), workload, "fp16").memory.cache.value == 2 * held
    assert bytes_per_token(decoder, "fp16", workload, in_place=True).cache == 2 * held
    assert estimate_performance(decoder, ORIN, workload, "fp16").memory.cache.value == 2 * held * 20 / 24
    assert estimate_performance(decoder, joining(ORIN), workload, "fp16").memory.cache.value == 2 * 2 * held * 20 / 24


@given(st.integers(1, 3), st.integers(1, 24), st.integers(1, 3))
def test_flops_by_counting_products(batch: int, prompt: int, layers: int) -> None:
    """Attention counted pair by pair: a query meets itself and all before it, or on average half the prompt."""
    decoder = uniform(32, layers, (4, 2, 8), 48, 100)
    pairs = sum(position + 0.5 for position in range(prompt))
    per_layer = 2 * prompt * 32 * (2 * 32 + 2 * 16 + 3 * 48) + pairs * 4 * (2 * 8 + 2 * 8)
    assert prefill_flops(decoder, Workload(batch, prompt, 64)) == pytest.approx(
        batch * (layers * per_layer + 2 * 32 * 100)
    )


def test_decode_flops_by_counting_products() -> None:
    """Two for each weight of matrices and head, and for each key and value that a query head meets."""
    decoder, workload = uniform(32, 2, (4, 2, 8), 48, 100), Workload(3, 1, 24)
    weights = 2 * 32 * (2 * 32 + 2 * 16 + 3 * 48) + 32 * 100
    assert decode_flops(decoder, workload) == 2 * 3 * (weights + 2 * 4 * 2 * 8 * 24)


def test_of_a_mixture_an_engine_that_routes_reads_a_token_s_own_experts() -> None:
    """One of two for each token: of three in a batch seven eighths on average, of a prompt of many nearly all."""
    dense = uniform(32, 1, (4, 2, 8), 48, 100)
    layer = dense.layers[0]
    decoder = replace(dense, layers=(replace(layer, mlp=replace(layer.mlp, experts=Experts(2, 1))),))
    expert, rest = 3 * 32 * 48, bytes_per_token(dense, "fp16", Workload(1, 8, 32)).layers / 2 - 3 * 32 * 48 + 2 * 32
    for batch, share in ((1, 0.5), (3, 0.875)):
        workload = Workload(batch, 8, 32)
        of_all, of_own = (bytes_per_token(decoder, "fp16", workload, routes=routes).layers for routes in (False, True))
        assert of_all == 2 * (rest + 2 * expert)
        assert of_own == 2 * (rest + 2 * share * expert)
        products = [decode_flops(decoder, workload, routes) for routes in (False, True)]
        assert products[0] - products[1] == 2 * batch * expert
        products = [prefill_flops(decoder, workload, routes=routes) for routes in (False, True)]
        assert products[0] - products[1] == pytest.approx(2 * 8 * batch * expert)
    processor = ORIN.model_copy(update={"dialect": "onnxruntime", "engine": "onnxruntime"})
    step, prompt = Workload(1, 1, 32), Workload(1, 64, 96)
    for profile, read in ((processor, 0.5), (ORIN, 1.0)):
        moved = bytes_per_token(decoder, "fp16", step, routes=read < 1).layers
        reading = decode_parts(decoder, profile, step, "fp16")["layers"]
        assert reading == pytest.approx(1e3 * moved / (ORIN.decode_efficiency.value * 204.8e9))
        whole = bytes_per_token(decoder, "fp16", prompt)
        of_prompt = prefill_parts(decoder, profile, prompt, "fp16")["weights"]
        assert of_prompt == pytest.approx(1e3 * (whole.layers + whole.head) / 204.8e9, rel=1e-6)


def test_minima_are_multiplied_with_one_number_for_each_group() -> None:
    decoder, workload = uniform(64, 2, (4, 2, 16), 128, 100), Workload(3, 8, 24)
    matrices = 64 * (2 * 64 + 2 * 32 + 3 * 128)
    codes, offset = (decoder.with_format(WEIGHT_FORMATS[name]) for name in ("int4-64", "int4-offset"))
    more = 2 * 3 * 2 * matrices / 64
    assert decode_flops(offset, workload) - decode_flops(codes, workload) == pytest.approx(more)
    assert prefill_flops(offset, workload) - prefill_flops(codes, workload) == pytest.approx(8 * more)


def test_a_speed_that_nobody_timed_is_told() -> None:
    offset, codes = (SMOLLM2.with_format(WEIGHT_FORMATS[name]) for name in ("int4-offset", "int4-64"))
    told, silent = (estimate_performance(decoder, ORIN, WORKLOAD, "fp16").notes for decoder in (offset, codes))
    (note,) = set(told) - set(silent)
    assert note == (
        "the speed of int4-offset is estimated from its bytes and products alone: nobody timed it on jetson-orin"
    )


def test_decode_is_bound_by_bytes_or_in_a_large_batch_by_compute() -> None:
    parts = decode_parts(SMOLLM2, ORIN, WORKLOAD, "fp16")
    assert parts["compute"] == 0
    many = Workload(4096, 1, 2)
    parts, estimate = decode_parts(SMOLLM2, ORIN, many, "fp16"), estimate_performance(SMOLLM2, ORIN, many, "fp16")
    flops = decode_flops(SMOLLM2, many)
    assert parts["compute"] > 0
    assert estimate.decode.value == pytest.approx(1e3 * flops / RATE + OVERHEAD)
    assert estimate.decode.value == pytest.approx(sum(parts.values()))
    assert estimate.decode.value == pytest.approx(sum(latency_shares(SMOLLM2, ORIN, many, "fp16").values()))
    assert "bound by compute" in estimate.decode.basis


@pytest.mark.parametrize("prompt", [1, 1024])
def test_the_parts_of_a_prefill_add_up(prompt: int) -> None:
    """Products, the weights once, what each token and each layer takes beside them."""
    workload = Workload(1, prompt, 2048)
    estimate = estimate_performance(SMOLLM2, ORIN, workload, "fp16").prefill
    flops = prefill_flops(SMOLLM2, workload, dialect=ORIN.dialect)
    weight_bytes = 2 * SMOLLM2.parameters
    assert estimate.value == pytest.approx(prefill_ms(prompt, flops, weight_bytes), rel=1e-3)
    parts = prefill_parts(SMOLLM2, ORIN, workload, "fp16")
    assert estimate.value == pytest.approx(sum(parts.values()))
    assert parts["compute"] == pytest.approx(1e3 * flops / RATE)
    assert parts["overhead"] == pytest.approx(OVERHEAD)
    for word in (f"42 TFLOP/s x {ORIN.prefill_efficiency.value:g}", "MB / 204.8 GB/s", "Qwen3-0.6B", "Edge-LLM"):
        assert word in estimate.basis


def test_a_constant_of_a_prefill_is_its_own() -> None:
    """As on H100: the same step, a longer prefill."""
    constant = HardwareFigure(value=2.5, unit="ms", source="constant", confidence="low")
    slower = ORIN.model_copy(update={"prefill_overhead": constant})
    one, two = (estimate_performance(SMOLLM2, profile, WORKLOAD, "fp16") for profile in (ORIN, slower))
    assert two.prefill.value == pytest.approx(one.prefill.value + 2.5)
    assert two.decode == one.decode
    assert "constant" in two.prefill.basis


def test_the_overhead_is_that_of_the_layers_and_of_their_modules() -> None:
    """A layer that has lost a module takes half; a processor's constant stands beside them."""
    one = 1e-3 * ORIN.layer_overhead.value
    halved = replace(SMOLLM2, layers=(*SMOLLM2.layers[:20], replace(SMOLLM2.layers[0], mlp=None)))
    assert overhead_ms(SMOLLM2, ORIN) == pytest.approx(30 * one)
    assert overhead_ms(halved, ORIN) == pytest.approx(20.5 * one)
    constant = HardwareFigure(value=3, unit="ms", source="test", confidence="low")
    measured = ORIN.model_copy(update={"layer_overhead": None, "decode_overhead": constant})
    assert overhead_ms(SMOLLM2, measured) == overhead_ms(halved, measured) == pytest.approx(3)


def test_fp32_on_tensor_cores_is_half_of_fp16_and_says_so() -> None:
    half, single = (prefill_parts(SMOLLM2, ORIN, Workload(1, 1024, 2048), p)["compute"] for p in ("fp16", "fp32"))
    assert single == pytest.approx(2 * half)
    assert "TF32" in estimate_performance(SMOLLM2, ORIN, Workload(1, 1024, 2048), "fp32").prefill.basis


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_shares_add_up_to_the_decode_estimate(precision: str) -> None:
    shares = latency_shares(SMOLLM2, ORIN, WORKLOAD, precision)
    assert list(shares) == ["layers", "head_and_embedding", "cache", "overhead"]
    assert sum(shares.values()) == pytest.approx(estimate_performance(SMOLLM2, ORIN, WORKLOAD, precision).decode.value)
    assert shares["overhead"] == pytest.approx(OVERHEAD)
    parts = decode_parts(SMOLLM2, ORIN, WORKLOAD, precision)
    assert sum(parts.values()) == pytest.approx(sum(shares.values()))
    assert parts["cache_copies"] == 0
    older = decode_parts(SMOLLM2, joining(ORIN), WORKLOAD, precision)
    assert older["cache_copies"] == 2 * older["cache"] == 2 * parts["cache"]  # it reads and writes all once more


def test_no_pruning_of_layers_removes_the_head_and_depth_alone_the_overhead() -> None:
    dense, floor = (latency_shares(d, ORIN, WORKLOAD, "fp16") for d in (SMOLLM2, floor_decoder(SMOLLM2, 64)))
    assert dense["head_and_embedding"] == floor["head_and_embedding"]
    assert dense["overhead"] == pytest.approx(30 * floor["overhead"])  # the floor is one layer
    narrow = latency_shares(SMOLLM2.with_widths(1, 1, 64), ORIN, WORKLOAD, "fp16")
    assert dense["overhead"] == narrow["overhead"]
    assert floor["layers"] < 0.1 * dense["layers"]


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 24))
def test_the_floor_is_below_every_candidate(groups: int, heads_per_group: int, multiples: int) -> None:
    (rotary,) = SMOLLM2.rotaries
    assert floor_decoder(SMOLLM2, 64).layers == (Layer(Attention(1, 1, 64, rotary), Mlp(64)),)
    floor = estimate_floor(SMOLLM2, ORIN, WORKLOAD, "fp16")
    candidate = SMOLLM2.with_widths(groups, heads_per_group, 64 * multiples)
    performance = estimate_performance(candidate, ORIN, WORKLOAD, "fp16")
    assert floor.memory.total <= performance.memory.total
    assert floor.decode.value <= performance.decode.value
    assert floor.prefill.value <= performance.prefill.value


@pytest.mark.parametrize("tied", [True, False])
def test_the_bytes_of_embedding_and_head_are_those_of_their_formats(tied: bool) -> None:
    decoder = replace(SMOLLM2, tie_word_embeddings=tied).with_format(None, WEIGHT_FORMATS["int8"])
    once = 49152 * (576 + 2)  # codes, and a scale for each token
    assert table_bytes(decoder, "fp16") == (once if tied else 2 * once)
    assert table_bytes(decoder.with_format(None), "fp16") == (1 if tied else 2) * 2 * 49152 * 576


def test_the_floor_of_odd_decoders() -> None:
    narrow = uniform(64, 2, (4, 2, 16), 48, 200)
    assert floor_decoder(narrow, 64).layers[0].mlp == Mlp(48)
    halved = replace(narrow, layers=(Layer(Attention(4, 2, 16), None), Layer(None, None)))
    assert floor_decoder(halved, 64).layers == (Layer(Attention(1, 1, 16), None),)


@pytest.mark.parametrize("profile", [p for p in list_profiles() if p.is_probed], ids=lambda profile: profile.name)
def test_every_figure_is_labelled_an_estimate_and_weak_points_are_named(profile: DeviceProfile) -> None:
    performance = estimate_performance(SMOLLM2, profile, WORKLOAD, profile.precision)
    figures = [performance.prefill, performance.decode, *performance.memory.parts.values()]
    assert {(figure.source, figure.device) for figure in figures} == {("estimated", profile.name)}
    assert all(figure.basis and figure.value > 0 for figure in figures)
    assert any(note.startswith("runtime_memory") for note in performance.notes)


def test_a_profile_without_the_figures_is_refused() -> None:
    cpu = load_profile("cpu")
    for function in (estimate_performance, latency_shares, estimate_floor):
        with pytest.raises(InputError, match="cpu has no hardware figures"):
            function(SMOLLM2, cpu, WORKLOAD, "fp32")
    rate = HardwareFigure(value=100, unit="GFLOP/s", source="test", confidence="low")
    probed = cpu.model_copy(update=ORIN.hardware | {"fp16_compute": None, "fp32_compute": rate})
    assert estimate_performance(SMOLLM2, probed, WORKLOAD, "fp32").prefill.value > 0
    with pytest.raises(InputError, match="no fp16 compute rate, which fp16 needs"):
        estimate_performance(SMOLLM2, probed, WORKLOAD, "fp16")


def test_bf16_is_fp16_but_for_its_logits() -> None:
    half, brain = (estimate_performance(SMOLLM2, ORIN, WORKLOAD, precision) for precision in ("fp16", "bf16"))
    assert (brain.prefill.value, brain.decode.value) == (half.prefill.value, half.decode.value)
    assert "fp16, which is bf16's too" in brain.prefill.basis
    logits = 2 * WORKLOAD.batch * SMOLLM2.vocab_size
    assert brain.memory.total - half.memory.total == brain.memory.buffers.value - half.memory.buffers.value == logits


@pytest.mark.parametrize("profile", list_profiles(), ids=lambda profile: profile.name)
def test_bf16_is_for_gpus_from_ampere_on(profile: DeviceProfile) -> None:
    if profile.engine != "onnxruntime":
        assert check_precision(profile, "bf16") == "bf16"
        with pytest.raises(InputError, match="SM 75 computes no product in it") as caught:
            check_precision(profile.model_copy(update={"sm": 75}), "bf16")
        assert caught.value.remedy == "Use --precision fp16."
        return
    with pytest.raises(InputError, match="cpu has no bf16: ONNX Runtime on a processor") as caught:
        check_precision(profile, "bf16")
    assert caught.value.remedy == "Use --precision fp32."


def test_a_precision_is_checked_before_anything_is_probed() -> None:
    cpu = load_profile("cpu")
    assert check_precision(cpu, "fp32") == "fp32"
    assert check_precision(ORIN, "fp16") == "fp16"
    with pytest.raises(InputError, match="no fp16 compute rate, which fp16 needs"):
        check_precision(cpu, "fp16")
    with pytest.raises(InputError, match="unknown precision 'fp7'"):
        check_precision(ORIN, "fp7")


def test_onnx_runtime_holds_one_cache_and_no_mask() -> None:
    here, there = (estimate_performance(SMOLLM2, p, WORKLOAD, "fp16") for p in (on_processor(ORIN), joining(ORIN)))
    assert 2 * here.memory.cache.value == there.memory.cache.value
    assert here.memory.activations.value == 2 * 512 * (2 * 576 + max(9 * 512 + 2 * 576 + 2 * 192, 3 * 1536))
    assert here.decode.value < there.decode.value


def test_a_cache_in_place_is_held_once_not_copied_and_attended_to_as_a_whole() -> None:
    """What its engine saves at each step, and what a prompt that is shorter than the context pays for it."""
    here, there = (estimate_performance(SMOLLM2, p, WORKLOAD, "fp16") for p in (ORIN, joining(ORIN)))
    assert 2 * here.memory.cache.value == there.memory.cache.value
    copies = 2 * here.memory.cache.value / READING
    assert there.decode.value - here.decode.value == pytest.approx(1e3 * copies)
    assert "one buffer" in here.memory.cache.basis
    assert "copy of the cache" in there.decode.basis
    assert "copy" not in here.decode.basis
    queries = 30 * 9 * 64
    causal, whole = 2 * 512 * 512 * queries, 4 * 512 * 2048 * queries  # scores and values, a multiply-add as two
    difference = prefill_flops(SMOLLM2, WORKLOAD, dialect="opset24") - prefill_flops(SMOLLM2, WORKLOAD)
    assert difference == whole - causal
    assert here.prefill.value > there.prefill.value


NAMES = ["in place", "long", "one token", "opset23", "small", "primitive", "batch"]
COMPILED = [  # dialect, decoder, workload
    ("opset24", uniform(576, 2, (9, 3, 64), 1536, 512), Workload(1, 512, 2048)),
    ("opset24", uniform(1024, 2, (16, 8, 128), 3072, 512), Workload(1, 128, 8192)),
    ("opset24", uniform(1024, 2, (16, 8, 128), 3072, 512), Workload(2, 1, 1024)),
    ("opset23", uniform(576, 2, (9, 3, 64), 1536, 512), Workload(1, 512, 2048)),
    ("opset23", uniform(576, 2, (3, 1, 64), 512, 512), Workload(1, 128, 512)),
    ("primitive", uniform(576, 2, (9, 3, 64), 1536, 512), Workload(1, 512, 2048)),
    ("primitive", uniform(1024, 2, (16, 8, 128), 3072, 512), Workload(2, 128, 512)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("dialect", "decoder", "workload"), COMPILED, ids=NAMES)
def test_activations_agree_with_what_tensorrts_compiler_reports(
    dialect: str, decoder: Decoder, workload: Workload, tmp_path: Path
) -> None:
    """TensorRT for RTX compiles for SM86 without a GPU; the log's figure is the compiler's own."""
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    variant = GraphVariant(dialect, "last")
    weights = {name: torch.zeros(shape) for name, shape in decoder.shapes().items()}
    path = write_graphs(decoder, weights, tmp_path, "fp16", [variant], workload.context).graphs[variant]
    lines: list[str] = []

    class KeepingLogger(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: object, line: str) -> None:
            lines.append(line)

    logger = KeepingLogger()
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    assert trt.OnnxParser(network, logger).parse_from_file(str(path))
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    profile = builder.create_optimization_profile()
    for tensor in map(network.get_input, range(network.num_inputs)):
        profile.set_shape(tensor.name, *shapes(tensor.name, tuple(tensor.shape), workload))
    config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config) is not None
    (reported,) = (int(line.split()[3]) for line in lines if line.startswith("Total Activation Memory"))
    assert activation_bytes(decoder, "fp16", workload, dialect) == pytest.approx(reported, rel=0.25)


def test_a_cache_in_int8_is_a_byte_a_number_and_slows_a_prefills_attention_as_the_profile_says():
    decoder, int8 = SMOLLM2, CACHE_FORMATS["int8"]
    workload, orin = Workload(1, 256, 1024), joining(ORIN)
    plain, codes = (estimate_performance(d, orin, workload, "fp16") for d in (decoder, decoder.with_cache(int8)))
    numbers = 2 * 30 * 3 * 64 * 1024
    assert plain.memory.cache.value - codes.memory.cache.value == 2 * numbers  # of both halves
    moved = [bytes_per_token(d, "fp16", workload) for d in (decoder, decoder.with_cache(int8))]
    assert [one.cache + one.cache_copies for one in moved] == [6 * numbers, 3 * numbers]  # read; and copied
    assert codes.decode.value < plain.decode.value
    offer = orin.cache["int8"].model_copy(update={"prefill": 4.0})
    slow = orin.model_copy(update={"cache": {"int8": offer}})
    attention = 2.0 * 256 * 256 * 30 * 9 * 64
    computing = [prefill_parts(d, slow, workload, "fp16")["compute"] for d in (decoder, decoder.with_cache(int8))]
    assert computing[1] - computing[0] == pytest.approx(1e3 * 3 * attention / RATE)


def test_a_cache_in_codes_is_joined_where_one_of_floats_is_written_in_place() -> None:
    """On an Orin int8 holds two caches and copies, fp16 neither: the search weighs the dialects with the formats."""
    int8 = SMOLLM2.with_cache(CACHE_FORMATS["int8"])
    assert [ORIN.for_cache(d.cache_format).dialect for d in (SMOLLM2, int8)] == ["opset24", "opset23"]
    floats, codes = (estimate_performance(decoder, ORIN, WORKLOAD, "fp16") for decoder in (SMOLLM2, int8))
    numbers = 2 * 30 * 3 * 64 * 2048
    assert floats.memory.cache.value == codes.memory.cache.value == 2 * numbers  # 2 bytes once; a byte twice
    assert ("one buffer" in floats.memory.cache.basis, "both held" in codes.memory.cache.basis) == (True, True)
    parts = [decode_parts(decoder, ORIN, WORKLOAD, "fp16") for decoder in (SMOLLM2, int8)]
    assert parts[0]["cache_copies"] == 0
    assert parts[1]["cache_copies"] == 2 * parts[1]["cache"] == parts[0]["cache"]
    assert codes.decode.value > floats.decode.value
    joined = estimate_performance(int8, joining(ORIN), WORKLOAD, "fp16")
    assert (codes.memory, codes.prefill, codes.decode) == (joined.memory, joined.prefill, joined.decode)
