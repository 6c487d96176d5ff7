"""Matrices of few bits in graphs: what ONNX Runtime makes of their operators, and the numbers that come out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto

from edgeprune.engine.onnx.graph import GraphVariant, graph_weight_bytes, write_graphs
from edgeprune.errors import InputError
from edgeprune.model.decoder import Attention, Decoder, Experts, Layer, Mlp, Rotary
from edgeprune.ondevice.onnxruntime import BY_CHANNEL_BLOCKS, open_session
from edgeprune.precision import WEIGHT_FORMATS, WeightFormat
from tests.support import parity
from tests.support.graph_models import VARIANTS, Sample, run_steps
from tests.support.graph_nodes import refused_types
from tests.support.roundings import INT8, OF_LAYERS, OF_WEIGHTS, OFFSET, mixed, numbers, rounded

FORMATS = pytest.mark.parametrize("form", OF_WEIGHTS, ids=lambda form: form.name)
SYMMETRIC = [form for form in OF_WEIGHTS if not form.offset]
LAYERS = pytest.mark.parametrize("form", OF_LAYERS, ids=lambda form: form.name)
RUNTIME = GraphVariant("onnxruntime", "last")
STANDARD = [variant for variant in VARIANTS if variant.dialect != "onnxruntime"]
ROTARY = Rotary(tuple(1000.0 ** (-pair / 8) for pair in range(8)))
MODULES = ("attention.qkv", "attention.o", "mlp.gate_up", "mlp.down")


def small(tied: bool = False, layers: int = 2, attention: Mapping = {}, **mlp: object) -> Decoder:
    """Widths that groups of 128 divide, and a vocabulary of an odd size."""
    layer = Layer(Attention(8, 2, 16, ROTARY, **attention), Mlp(128, **mlp))
    return Decoder("llama", 128, 201, 64, 1e-5, tied, (layer,) * layers)


def random_weights(decoder: Decoder) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: 0.1 * torch.randn(shape, generator=generator) + (len(shape) == 1)
        for name, shape in decoder.shapes().items()
    }


def fused(graph: Path, folder: Path) -> onnx.GraphProto:
    """The graph as ONNX Runtime runs it."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.add_session_config_entry(*BY_CHANNEL_BLOCKS)
    onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return onnx.load(folder / "optimised.onnx", load_external_data=False).graph


def operators(graph: onnx.GraphProto) -> list[str]:
    return [node.op_type for node in graph.node]


@pytest.mark.slow
@LAYERS
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_every_format_gives_our_own_walks_logits(form: WeightFormat, tied: bool, tmp_path: Path) -> None:
    decoder = small(tied).with_format(form, form if form in OF_WEIGHTS else INT8)
    errors = parity.stored_errors(decoder, rounded(decoder, random_weights(decoder)), tmp_path)
    assert max(errors.values()) < 1e-5, errors


@FORMATS
def test_experts_of_every_format_give_our_own_walks_logits(form: WeightFormat, tmp_path: Path) -> None:
    decoder = small(experts=Experts(3, 2)).with_format(form)
    errors = parity.stored_errors(decoder, rounded(decoder, random_weights(decoder)), tmp_path)
    assert max(errors.values()) < 1e-5, errors


@FORMATS
def test_on_rounded_inputs_the_logits_are_near(form: WeightFormat, tmp_path: Path) -> None:
    """The mode that is deployed: inputs of products are rounded to 8 bits, which costs some percent of a logit."""
    decoder = small(True).with_format(form, form)
    stored = rounded(decoder, random_weights(decoder))
    errors = parity.stored_errors(decoder, stored, tmp_path, exact=False)
    assert all(1e-3 < errors[variant] < 0.05 for variant in VARIANTS if variant.dialect == "onnxruntime"), errors


@pytest.mark.slow
@FORMATS
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_onnx_runtime_fuses_every_product(form: WeightFormat, tied: bool, precision: str, tmp_path: Path) -> None:
    """And it dequantises no table: that would take as long as all layers, at every step."""
    decoder = small(tied).with_format(form, form)
    written = write_graphs(decoder, rounded(decoder, random_weights(decoder)), tmp_path, precision, [RUNTIME])
    graph = fused(written.graphs[RUNTIME], tmp_path)
    products = [node for node in graph.node if node.op_type == "MatMulNBits"]
    named = {node.output[0] for node in products}
    if precision != "fp16":  # whose outputs are cast, and have other names
        assert named == {"logits", *(f"layers.{index}.{module}" for index in range(2) for module in MODULES)}
    assert len(products) == 9
    assert not {"DequantizeLinear", "MatMul"} & set(operators(graph))
    assert operators(graph).count("GatherBlockQuantized") == (form.bits == 4)
    settings = [{one.name: onnx.helper.get_attribute_value(one) for one in node.attribute} for node in products]
    assert {one["bits"] for one in settings} == {form.bits}
    assert {one["accuracy_level"] for one in settings} == {4}
    assert {one["block_size"] for one in settings} == {form.group or 128}


def test_the_means_of_groups_are_made_once_for_what_reads_the_same(tmp_path: Path) -> None:
    """Of queries, keys and values, of gate and up; their products with the minima are small ones."""
    biases = {"input_bias": True, "output_bias": True}
    decoder = small(layers=1, attention=biases, **biases)
    stored = rounded(decoder.with_format(OFFSET), random_weights(decoder))
    written = write_graphs(decoder.with_format(OFFSET), stored, tmp_path, "fp16", [RUNTIME])
    graph = onnx.load(written.graphs[RUNTIME], load_external_data=False).graph
    assert operators(graph).count("ReduceMean") == 4
    small_ones = [node for node in graph.node if node.op_type == "MatMul" and node.name.endswith(".offset")]
    assert len(small_ones) == 4
    offsets = {one.name: one for one in graph.initializer if one.name.endswith(".offsets")}
    assert {node.input[1] for node in small_ones} == set(offsets)
    assert {one.data_type for one in offsets.values()} == {TensorProto.FLOAT16}
    assert operators(fused(written.graphs[RUNTIME], tmp_path)).count("MatMulNBits") == 4


def test_experts_whose_groups_have_minima_are_refused(tmp_path: Path) -> None:
    decoder = small(layers=1, experts=Experts(3, 2)).with_format(OFFSET)
    with pytest.raises(InputError, match="no experts in int4-offset"):
        write_graphs(decoder, {}, tmp_path, "fp32", [RUNTIME])


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu", "gelu_quick"])
@pytest.mark.parametrize("has_biases", [True, False])
def test_onnx_runtime_fuses_plain_mlps_of_every_activation(activation: str, has_biases: bool, tmp_path: Path) -> None:
    biases = {"input_bias": has_biases, "output_bias": has_biases}
    decoder = small(attention=biases, gated=False, activation=activation, **biases).with_format(INT8, INT8)
    written = write_graphs(decoder, rounded(decoder, random_weights(decoder)), tmp_path, "fp32", [RUNTIME])
    graph = fused(written.graphs[RUNTIME], tmp_path)
    assert operators(graph).count("MatMulNBits") == 9
    assert "DequantizeLinear" not in operators(graph)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("form", [None, *SYMMETRIC], ids=lambda form: form.name if form else "float")
def test_onnx_runtime_reads_a_token_s_own_experts_alone(
    form: WeightFormat | None, precision: str, tmp_path: Path
) -> None:
    """In one operator, whose codes and scales are made when the session is: a step makes none of them again."""
    decoder = small(layers=1, experts=Experts(3, 2)).with_format(form)
    written = write_graphs(decoder, rounded(decoder, random_weights(decoder)), tmp_path, precision, [RUNTIME])
    graph = fused(written.graphs[RUNTIME], tmp_path)
    assert operators(graph).count("MoE" if form is None else "QMoE") == 1
    if form is not None:
        assert operators(graph).count("MatMulNBits") == 2
    assert not {"DequantizeLinear", "BitwiseXor", "TopK"} & set(operators(graph))
    assert not [node.name for node in graph.node if ".mlp." in node.name and node.op_type == "Expand"]


def test_bf16_codes_are_run_in_fp32_by_onnx_runtime(tmp_path: Path) -> None:
    """Scales are the same in every float type, so that the matrices are too; what is no matrix is rounded."""
    decoder = mixed(small(True))
    stored = rounded(decoder, random_weights(decoder))
    ids = parity.calibration()[:2, :21] % decoder.vocab_size
    halves = {n: w.bfloat16().float() for n, w in stored.items() if n not in decoder.weight_formats}
    wanted = parity.torch_logits(decoder, numbers(stored | halves), ids)
    variant = GraphVariant("onnxruntime", "all")
    path = write_graphs(decoder, stored, tmp_path, "bf16", [variant]).graphs[variant]
    batch = Sample(ids[:, :20].numpy(), np.ones((2, 20), np.int64), np.arange(20)[None].repeat(2, 0))
    (found,) = run_steps(path, batch, [20])
    assert found.dtype == np.float32
    assert parity.distance(found, wanted) < 1e-5


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("experts", [None, Experts(3, 2)], ids=["plain", "experts"])
def test_standard_graphs_are_valid_in_every_float_type(precision: str, experts: Experts | None, tmp_path: Path) -> None:
    decoder = mixed(small(experts=experts, layers=4))
    files = write_graphs(decoder, rounded(decoder, random_weights(decoder)), tmp_path, precision, STANDARD)
    for path in files.graphs.values():
        onnx.checker.check_model(path, full_check=True)
        model = onnx.load(path, load_external_data=False)
        assert refused_types(model) == []
        types = {one.data_type for one in model.graph.initializer if one.external_data}
        assert types >= {TensorProto.INT8, TensorProto.INT4}


@pytest.mark.parametrize(
    ("form", "experts", "opset"),
    [(None, None, 17), (INT8, None, 19), (WEIGHT_FORMATS["int4-64"], None, 21), (INT8, Experts(3, 2), 21)],
    ids=["floats", "int8", "int4", "experts of int8"],
)
def test_the_opset_is_raised_as_far_as_formats_need(
    form: WeightFormat | None, experts: Experts | None, opset: int, tmp_path: Path
) -> None:
    decoder = small(layers=1, experts=experts).with_format(form)
    files = write_graphs(decoder, rounded(decoder, random_weights(decoder)), tmp_path, "fp16", VARIANTS)
    for variant, path in files.graphs.items():
        versions = {one.domain: one.version for one in onnx.load(path, load_external_data=False).opset_import}
        assert versions[""] == {"opset23": 23, "opset24": 24}.get(variant.dialect, opset)


def test_all_variants_read_the_same_bytes(tmp_path: Path) -> None:
    """Whatever names they give them: a view of ONNX Runtime's is a part of an initializer, or all of it."""
    decoder = replace(mixed(small(True, experts=Experts(3, 2)), 2), embedding_format=INT8)
    files = write_graphs(decoder, rounded(decoder, random_weights(decoder)), tmp_path, "fp32", VARIANTS)
    assert len(files.data) == 2
    read = {}
    for variant, path in files.graphs.items():
        marks = {file.name: np.zeros(size, bool) for file, size in files.data.items()}
        for tensor in onnx.load(path, load_external_data=False).graph.initializer:
            if tensor.external_data:
                entry = {one.key: one.value for one in tensor.external_data}
                offset, length = int(entry["offset"]), int(entry["length"])
                marks[entry["location"]][offset : offset + length] = True
        read[variant.dialect] = np.concatenate(list(marks.values()))
    assert (read["primitive"] == read["opset23"]).all()
    assert (read["primitive"] == read["opset24"]).all()
    assert (read["onnxruntime"] >= read["primitive"]).all()  # which has rotary tables beside
    assert read["primitive"].sum() == graph_weight_bytes(decoder, "fp32")


def test_an_embedding_of_few_bits_is_exactly_codes_times_scales(tmp_path: Path) -> None:
    """A model of no layers whose final norm and head do nothing: what the head reads is the embedding's row."""
    for form in OF_WEIGHTS:
        decoder = replace(small(), vocab_size=128, layers=(Layer(None, None),), embedding_format=form)
        weights = random_weights(decoder) | {"head": torch.eye(128), "norm": torch.ones(128)}
        stored = rounded(decoder, weights)
        variant = GraphVariant("onnxruntime", "all")
        path = write_graphs(decoder, stored, tmp_path / form.name, "fp32", [variant]).graphs[variant]
        ids = np.arange(128)[None]
        inputs = {"input_ids": ids, "position_ids": ids, "attention_mask": np.ones_like(ids)}
        session = open_session(path, 1)
        known = {value.name for value in session.get_inputs()}
        (found,) = session.run(["logits"], {name: value for name, value in inputs.items() if name in known})
        rows = numbers(stored)["embedding"]
        normed = rows / (rows.square().mean(1, keepdim=True) + decoder.norm_eps).sqrt()
        np.testing.assert_allclose(found[0], normed.numpy(), rtol=2e-6)
