"""Products of rounded activations in graphs: what ONNX Runtime makes of them, and the numbers that come out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from edgeprune.engine.onnx.graph import GraphVariant, write_graphs
from edgeprune.model.decoder import Decoder
from edgeprune.model.forward import token_logits
from edgeprune.model.quantised import rounded_inputs
from edgeprune.precision import WEIGHT_FORMATS, WeightFormat
from tests.engine.onnx.test_quantised import MODULES, RUNTIME, fused, operators, random_weights, small
from tests.support import parity
from tests.support.graph_models import VARIANTS, Sample, run_steps
from tests.support.nvfp4_double import product
from tests.support.roundings import INT8, W8A8, Stored, rounded

FP8, NVFP4 = WEIGHT_FORMATS["fp8"], WEIGHT_FORMATS["nvfp4"]


def scaled(stored: Stored, scales: dict[str, float]) -> Stored:
    """The same weights with a scale of inputs for each module's matrices, powers of two."""
    return {
        name: replace(weight, input_scale=torch.tensor(scales["o" if name.endswith((".o", ".down")) else "in"]))
        if getattr(weight, "input_scale", None) is not None
        else weight
        for name, weight in stored.items()
    }


def expected(form: WeightFormat, tied: bool = True) -> tuple[Decoder, Stored, np.ndarray, Sample]:
    """A small model that rounds what it reads, the logits (2, 20, vocabulary) of our own walk over the ids, and these.

    The logits are far from those of activations that are not rounded.
    """
    decoder = small(tied, attention={"input_bias": True}).with_format(form)
    stored = scaled(rounded(decoder, random_weights(decoder)), {"in": 2.0**-5, "o": 2.0**-8})
    ids = parity.calibration()[:2, :21] % decoder.vocab_size
    wanted = token_logits(decoder, stored.items(), ids).numpy()
    plain = {name: getattr(weight, "dequantised", lambda w=weight: w)() for name, weight in stored.items()}
    floats = token_logits(decoder.with_format(None), plain.items(), ids).numpy()
    assert parity.distance(floats, wanted) > 1e-3
    return (
        decoder,
        stored,
        wanted,
        Sample(ids[:, :20].numpy(), np.ones((2, 20), np.int64), np.arange(20)[None].repeat(2, 0)),
    )


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "deployed"])
def test_graphs_give_the_logits_of_our_own_walk_on_rounded_activations(tied: bool, exact: bool, tmp_path: Path) -> None:
    """In all dialects. The head stays float: ONNX Runtime rounds the inputs of a head in int8 by itself where it is
    deployed."""
    decoder, stored, wanted, whole = expected(W8A8, tied)
    for variant, path in write_graphs(decoder, stored, tmp_path, "fp32", VARIANTS).graphs.items():
        found = np.concatenate(run_steps(path, whole, [18, 1, 1], exact=exact), axis=1)
        # A value next to the middle of two codes may fall on the other side.
        assert parity.distance(found, wanted[:, 20 - found.shape[1] :]) < 1e-3, variant


@pytest.mark.parametrize("form", [FP8, NVFP4], ids=lambda form: form.name)
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "deployed"])
def test_graphs_of_floats_of_few_bits_give_the_logits_of_our_own_walk(
    form: WeightFormat, exact: bool, tmp_path: Path
) -> None:
    """ONNX Runtime has kernels for e4m3, and the same arithmetic in its own dialect for groups of e2m1."""
    decoder, stored, wanted, whole = expected(form)
    variants = VARIANTS if form is FP8 else [variant for variant in VARIANTS if variant.dialect == "onnxruntime"]
    for variant, path in write_graphs(decoder, stored, tmp_path, "fp32", variants).graphs.items():
        found = np.concatenate(run_steps(path, whole, [18, 1, 1], exact=exact), axis=1)
        assert parity.distance(found, wanted[:, 20 - found.shape[1] :]) < 1e-5, variant


@pytest.mark.parametrize("dialect", ["opset24", "opset23", "primitive"])
def test_tensorrts_graphs_of_groups_are_the_same_by_a_double_of_its_operator(dialect: str, tmp_path: Path) -> None:
    """Each matrix of a module, and what it reads, in ONNX's reference evaluator against our own rounding."""
    decoder, stored, _, _ = expected(NVFP4)
    variant = GraphVariant(dialect, "last")
    model = onnx.load(write_graphs(decoder, stored, tmp_path, "fp32", [variant]).graphs[variant])
    assert {"trt": 1}.items() <= {one.domain: one.version for one in model.opset_import}.items()
    x = np.random.default_rng(0).standard_normal((2, 3, 128)).astype(np.float32) * 20
    weight = stored["layers.1.attention.o"]
    found = product(model, "layers.1.attention.o", x)
    inputs = rounded_inputs(torch.from_numpy(x), weight.input_scale, NVFP4)
    np.testing.assert_allclose(found, (inputs @ weight.dequantised().T).numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_onnx_runtime_multiplies_codes_with_codes(precision: str, tmp_path: Path) -> None:
    decoder = small(True).with_format(W8A8, INT8)
    written = write_graphs(decoder, rounded(decoder, random_weights(decoder)), tmp_path, precision, [RUNTIME])
    graph = fused(written.graphs[RUNTIME], tmp_path)
    products = [node for node in graph.node if node.op_type == "MatMulIntegerToFloat"]
    assert {node.output[0] for node in products} == {f"layers.{i}.{module}" for i in range(2) for module in MODULES}
    assert operators(graph).count("QuantizeLinear") == 8
    assert operators(graph).count("MatMulNBits") == 1  # the head
    assert not {"DequantizeLinear", "MatMul"} & set(operators(graph))


def test_a_graphs_product_is_that_of_the_codes(tmp_path: Path) -> None:
    """One product against numpy's, in whole numbers: values beyond the largest code are cut off, halves go to even."""
    decoder = small(layers=1).with_format(W8A8)
    stored = rounded(decoder, random_weights(decoder))
    written = write_graphs(decoder, stored, tmp_path, "fp32", [RUNTIME])
    model = onnx.load(written.graphs[RUNTIME])
    tensors = {one.name: onnx.numpy_helper.to_array(one, str(tmp_path)) for one in model.graph.initializer}
    weight = stored["layers.0.attention.o"]
    assert tensors["layers.0.attention.o.weight.input_scale"] == weight.input_scale.numpy()
    nodes = [node for node in model.graph.node if "attention.o" in node.name]
    assert [node.op_type for node in nodes] == ["QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "MatMul"]
    x = np.array([[0.5, 1.5, 2.5, -0.5, 500, -500, *range(122)]], np.float32) * float(weight.input_scale)
    read = {name for node in nodes for name in node.input}
    graph = onnx.helper.make_graph(
        nodes,
        "product",
        [onnx.helper.make_tensor_value_info(nodes[0].input[0], 1, x.shape)],
        [onnx.helper.make_tensor_value_info(nodes[-1].output[0], 1, (1, 128))],
        [onnx.numpy_helper.from_array(tensors[name], name) for name in read & tensors.keys()],
    )
    (tmp_path / "one.onnx").write_bytes(
        onnx.helper.make_model(graph, opset_imports=model.opset_import).SerializeToString()
    )
    (found,) = onnxruntime.InferenceSession(tmp_path / "one.onnx").run(None, {nodes[0].input[0]: x})
    codes = np.array([0, 2, 2, 0, 127, -128, *range(122)])
    sums = codes @ weight.codes.numpy().astype(np.int64).T
    np.testing.assert_allclose(found[0], sums * weight.scales[:, 0].numpy() * float(weight.input_scale), rtol=1e-6)
