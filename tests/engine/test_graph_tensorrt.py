"""TensorRT for RTX compiles the graphs for SM86 without a GPU; nothing runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from edgeprune.engine.onnx.graph import GraphVariant, graph_weight_bytes, write_graphs
from edgeprune.model.decoder import Attention, Decoder, Layer, Mlp
from edgeprune.ondevice.figures import Workload
from edgeprune.ondevice.tensorrt import compile_plan
from tests.engine.graph_models import llama
from tests.engine.graph_pictures import imagegpt, llamagen, random_weights
from tests.reference import decoder_of, weights_of

trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")


class KeepingLogger(trt.ILogger):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[trt.ILogger.Severity, str]] = []

    def log(self, severity: trt.ILogger.Severity, line: str) -> None:
        self.lines.append((severity, line))

    def figure(self, label: str) -> int:
        (line,) = (line for _, line in self.lines if line.startswith(label))
        return int(line.removeprefix(label).split()[1])


def decoder_shape(tensor: trt.ITensor, batch: int, sequence: int, past: int) -> tuple[int, ...]:
    if tensor.name.startswith("past"):
        return batch, tensor.shape[1], past, tensor.shape[3]
    return batch, past + sequence if tensor.name == "attention_mask" else sequence


def build(path: Path, shape: Callable[..., tuple[int, ...]] = decoder_shape) -> KeepingLogger:
    """Compile for SM86 with one profile: batch 1..2, sequence 1..32, past 0..64. Returns the log."""
    logger = KeepingLogger()
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(path)), [str(parser.get_error(i)) for i in range(parser.num_errors)]
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    profile = builder.create_optimization_profile()
    for tensor in map(network.get_input, range(network.num_inputs)):
        profile.set_shape(tensor.name, *(shape(tensor, *sizes) for sizes in ((1, 1, 0), (1, 1, 16), (2, 32, 64))))
    config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config) is not None
    return logger


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
