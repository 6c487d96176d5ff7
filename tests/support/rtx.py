"""TensorRT for RTX's compiler; whoever imports this is skipped where it is missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

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
    tokens = past + sequence if tensor.name == "attention_mask" else sequence
    sizes = (batch, tokens, *list(tensor.shape)[2:])[: len(tensor.shape)]
    if tensor.name.startswith("past"):
        sizes = batch, tensor.shape[1], past, tensor.shape[3]
    return tuple(size if asked < 0 else asked for size, asked in zip(sizes, tensor.shape, strict=True))


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
