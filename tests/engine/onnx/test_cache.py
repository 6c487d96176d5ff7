"""A KV cache in codes: graphs against transformers over a cache that is rounded in the same way, and what is built."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from edgeprune.engine.onnx.graph import GraphVariant, graph_weight_bytes, write_graphs
from edgeprune.errors import EngineError
from edgeprune.model.decoder import Attention, Decoder, Layer, Mlp, Rotary
from edgeprune.ondevice.figures import Workload
from edgeprune.ondevice.onnxruntime import GraphRunner
from edgeprune.ondevice.tensorrt import compile_plan
from edgeprune.precision import CACHE_FORMATS
from tests.support import parity
from tests.support.graph_models import VARIANTS, WALKS, Sample, llama, reference_logits, run_steps, sample
from tests.support.reference import decoder_of, weights_of
from tests.support.rounded_cache import RoundedCache, cached_logits, largest, rounded
from tests.support.rtx import trt

INT8, FP8 = CACHE_FORMATS["int8"], CACHE_FORMATS["fp8"]
IN_CODES = [variant for variant in VARIANTS if variant.dialect in ("opset23", "onnxruntime")]
ROTARY = Rotary(tuple(1000.0 ** (-pair / 8) for pair in range(8)))
Scales = list[tuple[np.ndarray, np.ndarray]]


@pytest.fixture(scope="module")
def batch() -> Sample:
    return sample(sum(WALKS["decode"]))


@pytest.fixture(scope="module")
def model():
    return llama(True)


def with_scales(model, scales: Scales) -> tuple[Decoder, dict[str, torch.Tensor]]:
    """Its decoder with a cache in int8, and all weights of it."""
    weights = dict(weights_of(model))
    for index, pair in enumerate(scales):
        for part, scale in zip(("key", "value"), pair, strict=True):
            weights[f"layers.{index}.attention.{part}_scale"] = torch.from_numpy(scale)
    return decoder_of(model.config).with_cache(INT8), weights


def steps_of(scales: Scales, share: float) -> Scales:
    """Scales by which the largest number of each channel is so many times the largest code."""
    return [tuple((share * part / 127).astype(np.float32) for part in pair) for pair in scales]


def error_of(
    logits: list[np.ndarray], walk: list[int], variant: GraphVariant, wanted: np.ndarray, batch: Sample
) -> float:
    """max|a - b| / max|b| over all real positions that the graph gives logits of."""
    ends = np.cumsum(walk)
    places = np.arange(ends[-1]) if variant.logits == "all" else ends - 1
    real = batch.mask[:, places] > 0
    ours, theirs = np.concatenate(logits, axis=1)[real], wanted[:, places][real]
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize("share", [1.0, 0.5, 9.0], ids=["whole", "cut off", "coarse"])
def test_logits_are_those_over_a_cache_that_is_rounded_in_the_same_way(model, batch, share, tmp_path: Path) -> None:
    """Brute force: transformers over numpy's codes. `cut off`: half of the range; `coarse`: 14 steps to each side."""
    scales = steps_of(largest(model, batch), share)
    decoder, weights = with_scales(model, scales)
    expected, plain = cached_logits(model, batch, RoundedCache(scales)), reference_logits(model, batch)
    real = batch.mask > 0
    off = np.abs(expected - plain)[real].max() / np.abs(plain[real]).max()
    files = write_graphs(decoder, weights, tmp_path, "fp32", VARIANTS)
    for variant, path in files.graphs.items():
        in_place = 64 if variant.dialect == "onnxruntime" else None
        for walk in WALKS.values():
            logits = run_steps(path, batch, walk, in_place)
            if variant in IN_CODES:
                # A number halfway between two codes may take the other one.
                assert error_of(logits, walk, variant, expected, batch) < max(1e-4, 0.01 * off)
            else:
                assert error_of(logits, walk, variant, plain, batch) < 1e-5


def test_a_cache_in_int8_costs_little(model, batch, tmp_path: Path) -> None:
    """Even of a random model, whose logits any change moves; of a trained one, see docs/precision.md."""
    decoder, weights = with_scales(model, steps_of(largest(model, batch), 1.0))
    expected = reference_logits(model, batch)
    files = write_graphs(decoder, weights, tmp_path, "fp32", IN_CODES)
    for variant, path in files.graphs.items():
        logits = run_steps(path, batch, WALKS["decode"], 64 if variant.dialect == "onnxruntime" else None)
        assert error_of(logits, WALKS["decode"], variant, expected, batch) < 0.1


def test_sinks_and_windows_over_a_cache_in_int8(tmp_path: Path) -> None:
    """Against our own walk over the same codes, which the rounding takes far from that over floats."""
    model = parity.dense(tmp_path / "model", "gpt_oss").model
    decoder, weights = model.decoder.with_cache(INT8), dict(model.weights)
    generator, ids = torch.Generator().manual_seed(0), parity.calibration()[:2, :30]
    for name, shape in decoder.shapes().items():
        if name.endswith(("key_scale", "value_scale")):
            weights[name] = 0.03 + 0.02 * torch.rand(shape, generator=generator)
    wanted = parity.torch_logits(decoder, weights, ids)
    assert parity.distance(wanted, parity.torch_logits(model.decoder, model.weights, ids)) > 0.1
    whole = Sample(ids.numpy(), np.ones((2, 30), np.int64), np.arange(30)[None].repeat(2, 0))
    variants = [variant for variant in IN_CODES if variant.logits == "all"]
    for variant, path in write_graphs(decoder, weights, tmp_path / "graphs", "fp32", variants).graphs.items():
        in_place = 64 if variant.dialect == "onnxruntime" else None
        found = np.concatenate(run_steps(path, whole, [20, *[1] * 10], in_place), axis=1)
        assert parity.distance(found[:, :-1], wanted) < 1e-5


def test_the_cache_holds_numpys_codes(model, batch, tmp_path: Path) -> None:
    """Of the first layer, whose keys and values no rounding has touched; and it is a quarter of that of floats."""
    scales = steps_of(largest(model, batch), 1.0)
    decoder, weights = with_scales(model, scales)
    variant = GraphVariant("onnxruntime", "last")
    path = write_graphs(decoder, weights, tmp_path, "fp32", [variant]).graphs[variant]
    runner = GraphRunner(path, 2, batch.tokens)
    positions = np.maximum(batch.mask.cumsum(1) - 1, 0)
    cache = RoundedCache()
    cached_logits(model, replace(batch, positions=positions), cache)
    runner.run(batch.ids, batch.mask)
    floats = write_graphs(decoder.with_cache(None), weights, tmp_path / "floats", "fp32", [variant]).graphs[variant]
    assert 4 * runner.cache_bytes == GraphRunner(floats, 2, batch.tokens).cache_bytes
    for part, states, scale in zip(("key", "value"), cache.seen[0], scales[0], strict=True):
        codes = runner._cache[f"past_key_values.0.{part}"]
        assert codes.dtype == np.int8
        expected = (rounded(torch.from_numpy(states), scale).numpy() / scale).round()
        assert (np.abs(codes - expected) <= 1).all()
        assert (codes != expected).mean() < 1e-3


@pytest.mark.parametrize(
    "attention",
    [
        Attention(8, 2, 12, Rotary(ROTARY.inverse_frequencies[:6])),  # zeros behind each head
        Attention(4, 4, 16, ROTARY, window=7, qk_norm="head"),
        Attention(8, 2, 16, ROTARY, softcap=5.0, scale=0.3),
        Attention(6, 1, 16, None, qk_norm="all"),
        Attention(1, 1, 16, ROTARY),
    ],
    ids=["heads of 12", "window", "softcap", "one key head", "one head"],
)
def test_every_attention_gives_our_own_walks_logits(attention: Attention, tmp_path: Path) -> None:
    decoder = Decoder("llama", 64, 201, 64, 1e-5, True, (Layer(attention, Mlp(96)),) * 2).with_cache(INT8)
    weights = random_weights(decoder, 127)
    errors = parity.stored_errors(decoder, weights, tmp_path)
    assert all(errors[variant] < 1e-4 for variant in IN_CODES), errors
    assert all(errors[variant] > 1e-3 for variant in VARIANTS if variant not in IN_CODES), errors


def random_weights(decoder: Decoder, codes: float) -> dict[str, torch.Tensor]:
    """Scales by which some numbers are cut off."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in decoder.shapes().items():
        weights[name] = 0.1 * torch.randn(shape, generator=generator) + (len(shape) == 1)
        if name.endswith("_scale"):
            weights[name] = (0.5 + torch.rand(shape, generator=generator)) / codes
    return weights


def test_scales_are_floats_of_32_bits_in_every_precision(tmp_path: Path) -> None:
    decoder = Decoder("llama", 64, 201, 64, 1e-5, True, (Layer(Attention(8, 2, 16, ROTARY), Mlp(96)),))
    whole, scales = (graph_weight_bytes(d, "fp16") for d in (decoder, decoder.with_cache(INT8)))
    assert scales - whole == 2 * 4 * 2 * 16
    assert decoder.with_cache(INT8).parameters == decoder.parameters


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "form", "sm"),
    [
        ("fp16", INT8, 75),  # which has no bf16
        *((precision, INT8, sm) for precision in ("fp16", "bf16") for sm in (86, 120)),
        *((precision, FP8, sm) for precision in ("fp16", "bf16") for sm in (89, 120)),
    ],
)
def test_tensorrt_builds_it_and_needs_no_more_activations(form, sm: int, precision: str, tmp_path: Path) -> None:
    assert trt
    sizes = {}
    for codes in (None, form):
        decoder = Decoder("llama", 256, 300, 4096, 1e-5, True, (Layer(Attention(8, 2, 32, ROTARY), Mlp(512)),) * 2)
        decoder = decoder.with_cache(codes)
        variant = GraphVariant("opset23", "last")
        weights = random_weights(decoder, form.most)
        path = write_graphs(decoder, weights, tmp_path / str(codes), precision, [variant]).graphs[variant]
        built = compile_plan(path, tmp_path / "plan", Workload(1, 32, 4096), sm, "tensorrt-rtx")
        sizes[codes] = built.context_bytes
    assert sizes[form] <= 1.05 * sizes[None] + 2**18


def test_no_gpu_before_sm_89_has_fp8(tmp_path: Path) -> None:
    assert trt
    decoder = Decoder("llama", 64, 201, 64, 1e-5, True, (Layer(Attention(8, 2, 16, ROTARY), Mlp(96)),)).with_cache(FP8)
    variant = GraphVariant("opset23", "last")
    path = write_graphs(decoder, random_weights(decoder, 448), tmp_path, "fp16", [variant]).graphs[variant]
    with pytest.raises(EngineError, match="fp8_e4m3"):
        compile_plan(path, tmp_path / "plan", Workload(1, 8, 32), 86, "tensorrt-rtx")
