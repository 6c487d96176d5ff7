"""TensorRT for RTX compiles the graphs for SM86 without a GPU; nothing runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from edgeprune.engine.onnx.graph import GraphVariant, graph_weight_bytes, write_graphs
from edgeprune.model.decoder import Attention, Decoder, Layer, Mlp
from edgeprune.ondevice.figures import Workload
from edgeprune.ondevice.tensorrt import compile_plan
from tests.support.graph_models import llama
from tests.support.graph_pictures import imagegpt, llamagen, random_weights
from tests.support.reference import decoder_of, weights_of
from tests.support.rtx import build, trt


@pytest.mark.parametrize("dialect", ["opset23", "primitive"])
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
    variants = [GraphVariant("opset23", "all"), GraphVariant("primitive", "all")]
    files = write_graphs(decoder, weights_of(model), tmp_path, "fp16", variants)
    for path in files.graphs.values():
        weights = graph_weight_bytes(decoder, "fp16")
        assert weights <= build(path).figure("Total Weights Memory") <= 1.01 * weights


@pytest.mark.parametrize("dialect", ["opset23", "primitive"])
@pytest.mark.parametrize("decoder", [llamagen(head_dim=100), imagegpt()], ids=["heads of 100", "3 heads"])
def test_builds_image_generators_to_read_one_token_at_a_time(decoder: Decoder, dialect: str, tmp_path: Path) -> None:
    """For a single query there is no kernel for these heads."""
    variant = GraphVariant(dialect, "last")
    files = write_graphs(decoder, random_weights(decoder), tmp_path, "fp16", [variant])
    built = compile_plan(files.graphs[variant], tmp_path / "plan", Workload(2, 1, 16), 86, "tensorrt-rtx")
    weights = graph_weight_bytes(decoder, "fp16")
    assert weights <= built.weights_bytes <= 1.02 * weights
