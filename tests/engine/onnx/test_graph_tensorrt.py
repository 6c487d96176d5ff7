"""TensorRT for RTX compiles the graphs, most for SM86, without a GPU; nothing runs."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from edgeprune.engine.engines import dequantises
from edgeprune.engine.onnx.graph import GraphVariant, graph_weight_bytes, write_graphs
from edgeprune.errors import EngineError
from edgeprune.model.decoder import Attention, Decoder, Experts, Layer, Mlp, Rotary
from edgeprune.ondevice.figures import Workload
from edgeprune.ondevice.tensorrt import BuildResult, compile_plan
from edgeprune.precision import WEIGHT_FORMATS
from tests.support.graph_models import llama
from tests.support.graph_pictures import imagegpt, llamagen, random_weights
from tests.support.reference import decoder_of, weights_of
from tests.support.roundings import rounded
from tests.support.rtx import build, trt


@pytest.mark.slow
@pytest.mark.parametrize("dialect", ["opset24", "opset23", "primitive"])
@pytest.mark.parametrize("tied", [True, False])
def test_builds_and_holds_each_weight_once(dialect: str, tied: bool, tmp_path: Path) -> None:
    """With 4000 tokens the head is most of the model: held twice it would double the weights."""
    model = llama(tied, vocab_size=4000)
    decoder, variant = decoder_of(model.config), GraphVariant(dialect, "last")
    files = write_graphs(decoder, weights_of(model), tmp_path, "fp16", [variant])
    log = build(files.graphs[variant])
    weights = graph_weight_bytes(decoder, "fp16", dialect)
    assert weights <= log.figure("Total Weights Memory") <= 1.01 * weights
    complaints = [line for severity, line in log.lines if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR)]
    assert not complaints


def test_builds_layers_of_different_widths(tmp_path: Path) -> None:
    model = llama(True)
    layers = (Layer(Attention(6, 2, 16), None), Layer(None, Mlp(128)), Layer(Attention(6, 2, 16), Mlp(128)))
    decoder = dataclasses.replace(decoder_of(model.config), layers=layers)
    variants = [GraphVariant(dialect, "all") for dialect in ("opset24", "opset23", "primitive")]
    files = write_graphs(decoder, weights_of(model), tmp_path, "fp16", variants)
    for path in files.graphs.values():
        weights = graph_weight_bytes(decoder, "fp16")
        assert weights <= build(path).figure("Total Weights Memory") <= 1.01 * weights


@pytest.mark.slow
@pytest.mark.parametrize("dialect", ["opset24", "opset23", "primitive"])
@pytest.mark.parametrize("decoder", [llamagen(head_dim=100), imagegpt()], ids=["heads of 100", "3 heads"])
def test_builds_image_generators_to_read_one_token_at_a_time(decoder: Decoder, dialect: str, tmp_path: Path) -> None:
    """For a single query there is no kernel for these heads."""
    variant = GraphVariant(dialect, "last")
    files = write_graphs(decoder, random_weights(decoder), tmp_path, "fp16", [variant])
    built = compile_plan(files.graphs[variant], tmp_path / "plan", Workload(2, 1, 16), 86, "tensorrt-rtx")
    weights = graph_weight_bytes(decoder, "fp16")
    assert weights <= built.weights_bytes <= 1.02 * weights


@pytest.mark.slow
@pytest.mark.parametrize("sm", [75, 80, 86, 89, 120, 121])
def test_a_cache_in_place_builds_for_every_sm(sm: int, tmp_path: Path) -> None:
    """With a window, a softcap and a single head, whose attention is written in other operators."""
    rotary = Rotary(tuple(10000.0 ** (-pair / 16) for pair in range(16)))
    attentions = (
        Attention(8, 2, 32, rotary),
        Attention(8, 4, 32, rotary, window=20),
        Attention(4, 4, 32, rotary, softcap=30.0),
        Attention(1, 1, 32, rotary),
    )
    layers = tuple(Layer(attention, Mlp(256)) for attention in attentions)
    decoder = Decoder("llama", 128, 512, 128, 1e-5, False, layers)
    variant = GraphVariant("opset24", "last")
    graph = write_graphs(decoder, random_weights(decoder), tmp_path, "fp16", [variant], 96).graphs[variant]
    result = compile_plan(graph, tmp_path / "plan", Workload(2, 32, 96), sm, "tensorrt-rtx")
    weights = graph_weight_bytes(decoder, "fp16")
    assert weights <= result.weights_bytes <= 1.02 * weights


def test_a_cache_in_place_of_another_length_is_refused(tmp_path: Path) -> None:
    """An engine is of one context, which the graph states; the real parser takes no other."""
    decoder, variant = wide(), GraphVariant("opset24", "last")
    graph = write_graphs(decoder, random_weights(decoder), tmp_path, "fp16", [variant], 64).graphs[variant]
    with pytest.raises(EngineError, match="room for 64 tokens, not for a context of 96"):
        compile_plan(graph, tmp_path / "plan", workload_of(1), 86, "tensorrt-rtx")


def wide(tied: bool = False, experts: Experts | None = None) -> Decoder:
    """Matrices that are large beside what the compiler's figures vary by: a head of 4 MB in fp16."""
    rotary = Rotary(tuple(10000.0 ** (-pair / 32) for pair in range(32)))
    layer = Layer(Attention(8, 4, 64, rotary), Mlp(1024, experts=experts))
    return Decoder("llama", 512, 4096, 128, 1e-5, tied, (layer,) * 2)


def workload_of(batch: int) -> Workload:
    return Workload(batch, 32, 96)


@cache
def built(
    decoder: Decoder, dialect: str = "opset23", sm: int = 86, precision: str = "fp16", batch: int = 1
) -> BuildResult:
    """Of a graph that gives the last position's logits, the one that products with the head are hardest for."""
    variant = GraphVariant(dialect, "last")
    stored = rounded(decoder, random_weights(decoder))
    with TemporaryDirectory() as folder:
        context = workload_of(batch).context
        graph = write_graphs(decoder, stored, Path(folder), precision, [variant], context).graphs[variant]
        return compile_plan(graph, Path(folder) / "plan", workload_of(batch), sm, "tensorrt-rtx")


def judged(decoder: Decoder, **settings: object) -> bool:
    """Whether the compiler is found to dequantise, by its figures for the same shapes in floats."""
    figures = [built(one, **settings).context_bytes for one in (decoder, decoder.with_format(None))]
    return dequantises(*figures, decoder, workload_of(settings.get("batch", 1)), settings.get("precision", "fp16"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layers", "tables", "sm", "dialect"),
    [
        ("int8", "int8", 86, "opset24"),
        ("int8", "int8", 86, "opset23"),
        ("int8", "int8", 86, "primitive"),
        ("int8", "int8", 75, "primitive"),
        ("int8", None, 86, "opset23"),
        ("int4-32", "int8", 86, "opset24"),
        ("int4-32", "int8", 86, "primitive"),
        ("int4-64", "int4-64", 86, "opset23"),
        ("int4-128", "int8", 86, "opset24"),
        ("int4-offset", "int8", 86, "opset24"),
        ("int4-offset", "int8", 86, "primitive"),
    ],
)
def test_codes_stay_packed_and_no_copy_is_made(layers: str, tables: str | None, sm: int, dialect: str) -> None:
    """For a batch of one too, in which the compiler dequantises a head of int8 if it knows that it has one row."""
    decoder = wide().with_format(WEIGHT_FORMATS[layers], WEIGHT_FORMATS.get(tables))
    weights = graph_weight_bytes(decoder, "fp16", dialect)
    assert weights <= built(decoder, dialect, sm).weights_bytes <= 1.01 * weights
    assert not judged(decoder, dialect=dialect, sm=sm)


@pytest.mark.slow
def test_a_tied_table_of_int8_is_held_once_and_one_of_int4_twice() -> None:
    """Of int4 the compiler keeps one copy for the product and one for the embedding: as much as untied."""
    int8, int4 = (wide(True).with_format(WEIGHT_FORMATS[name], WEIGHT_FORMATS[name]) for name in ("int8", "int4-64"))
    once = graph_weight_bytes(int8, "fp16")
    assert once <= built(int8).weights_bytes <= 1.01 * once
    assert not judged(int8)
    twice = graph_weight_bytes(dataclasses.replace(int4, tie_word_embeddings=False), "fp16")
    assert built(int4).weights_bytes == pytest.approx(twice, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layers", ["int8", "int4-32"])
def test_codes_stay_packed_in_every_float_type(precision: str, layers: str) -> None:
    dialect = "primitive" if precision == "fp32" else "opset23"
    decoder = wide(True).with_format(WEIGHT_FORMATS[layers], WEIGHT_FORMATS["int8"])
    weights = graph_weight_bytes(decoder, precision, dialect)
    assert weights <= built(decoder, dialect, precision=precision).weights_bytes <= 1.01 * weights
    assert not judged(decoder, dialect=dialect, precision=precision)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layers", "dialect"),
    [
        ("int8", "opset24"),
        ("int8", "primitive"),
        ("int4-32", "opset23"),
        ("int4-128", "opset24"),
        ("int4-32", "primitive"),
    ],
)
def test_the_codes_of_experts_stay_packed(layers: str, dialect: str) -> None:
    decoder = wide(experts=Experts(3, 2)).with_format(WEIGHT_FORMATS[layers], WEIGHT_FORMATS["int8"])
    weights = graph_weight_bytes(decoder, "fp16", dialect)
    assert weights <= built(decoder, dialect).weights_bytes <= 1.01 * weights
    assert not judged(decoder, dialect=dialect)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sm", "dialect"), [(75, "primitive"), (86, "opset23"), (86, "primitive"), (89, "opset23"), (120, "primitive")]
)
def test_products_of_rounded_activations_are_built_without_copies(sm: int, dialect: str) -> None:
    decoder = wide(True).with_format(WEIGHT_FORMATS["w8a8"], WEIGHT_FORMATS["int8"])
    weights = graph_weight_bytes(decoder, "fp16", dialect)
    assert weights <= built(decoder, dialect, sm).weights_bytes <= 1.01 * weights
    assert not judged(decoder, dialect=dialect, sm=sm)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layers", "sm", "dialect", "precision"),
    [
        ("fp8", 89, "opset24", "fp16"),
        ("fp8", 120, "primitive", "fp32"),
        ("nvfp4", 120, "opset24", "fp16"),
        ("nvfp4", 121, "opset23", "bf16"),
    ],
)
def test_products_of_floats_of_few_bits_are_built_without_copies(
    layers: str, sm: int, dialect: str, precision: str
) -> None:
    decoder = wide(True).with_format(WEIGHT_FORMATS[layers], WEIGHT_FORMATS["int8"])
    weights = graph_weight_bytes(decoder, precision, dialect)
    assert weights <= built(decoder, dialect, sm, precision=precision).weights_bytes <= 1.01 * weights
    assert not judged(decoder, dialect=dialect, sm=sm, precision=precision)


@pytest.mark.parametrize(("layers", "sm"), [("fp8", 86), ("nvfp4", 89)])
def test_floats_of_few_bits_need_a_gpu_that_has_them(layers: str, sm: int) -> None:
    with pytest.raises(EngineError, match="SM|sm|HW-specific"):
        built(wide().with_format(WEIGHT_FORMATS[layers]), sm=sm)


@pytest.mark.slow
def test_copies_are_told_by_the_activations() -> None:
    """On SM 75 the compiler dequantises int8 in a batch of two; the weights do not show it."""
    decoder = wide(True).with_format(WEIGHT_FORMATS["int8"], WEIGHT_FORMATS["int8"])
    result = built(decoder, sm=75, batch=2)
    assert result.weights_bytes <= 1.01 * graph_weight_bytes(decoder, "fp16")
    assert not result.warnings
    assert judged(decoder, sm=75, batch=2)
    assert not judged(decoder, sm=86, batch=2)


def test_what_the_builder_lacks_is_refused_by_name() -> None:
    """Zeros that are not 0, and int4 on SM 75."""
    with pytest.raises(EngineError, match=r"at node layers\.0\.attention\.qkv\.weight .*zero point") as caught:
        built(wide().with_format(WEIGHT_FORMATS["int4-32-asymmetric"]))
    assert caught.value.remedy
    with pytest.raises(EngineError, match="int4") as caught:
        built(wide().with_format(WEIGHT_FORMATS["int4-64"]), sm=75)
    assert "int8" in caught.value.remedy
