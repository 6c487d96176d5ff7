"""The estimate of a build's memory: against builds of TensorRT for RTX here, and what it adds for which device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from edgeprune.engine.build_memory import build_limit, build_memory, note_of_build
from edgeprune.engine.checkup_model import RandomWeights
from edgeprune.engine.estimate import estimate_memory
from edgeprune.engine.onnx.graph import GraphVariant, graph_weight_bytes, write_graphs
from edgeprune.model.decoder import Decoder
from edgeprune.ondevice.build_room import ERROR
from edgeprune.ondevice.figures import Workload
from edgeprune.ondevice.measure import LocalSession, build
from edgeprune.ondevice.worker import quiet
from edgeprune.precision import WEIGHT_FORMATS
from edgeprune.profiles import load_profile, with_tensorrt
from tests.support.shapes import uniform

TASK = Workload(batch=1, prompt=128, context=512)
LARGE = uniform(1024, 4, (16, 4, 64), 3072, 8192)
INT8, INT4 = WEIGHT_FORMATS["int8"], WEIGHT_FORMATS["int4-64"]
ORIN, L4 = load_profile("jetson-orin"), load_profile("l4")


def untied(decoder: Decoder) -> Decoder:
    return replace(decoder, tie_word_embeddings=False)


@pytest.mark.slow
@pytest.mark.parametrize("form", [None, INT8, INT4], ids=["float", "int8", "int4"])
def test_a_real_build_takes_what_is_estimated(form, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    decoder = untied(LARGE).with_format(form, form if form is INT8 else None)
    variant = GraphVariant("opset23", "last")
    files = write_graphs(decoder, RandomWeights(decoder), tmp_path, "fp16", [variant])
    result = build(LocalSession(), "tensorrt-rtx", files.graphs[variant], tmp_path / "plan", TASK, quiet, 86)
    assert build_memory(decoder, L4, TASK, "fp16").host == pytest.approx(result.peak_build_bytes, rel=ERROR)


def test_where_the_memory_is_shared_the_engine_counts_too() -> None:
    on_board, beside = (build_memory(LARGE, profile, TASK, "fp16") for profile in (ORIN, L4))
    assert on_board.host == beside.host
    memory = estimate_memory(LARGE, ORIN, TASK, "fp16")
    assert on_board.engine == memory.weights.value + memory.activations.value
    assert (beside.engine, beside.total) == (0, beside.host)
    assert (build_limit(ORIN), build_limit(L4)) == (62_000_000_000, None)


def test_fewer_bits_layers_and_copies_take_less() -> None:
    def host(decoder: Decoder, version: str = "10.16") -> float:
        return build_memory(decoder, with_tensorrt(ORIN, version), TASK, "fp16").host

    assert host(LARGE.with_format(INT4)) < host(LARGE.with_format(INT8)) < host(LARGE)
    assert host(replace(LARGE, layers=LARGE.layers[:2])) < host(LARGE)
    weights = graph_weight_bytes(LARGE, "fp16", "primitive", TASK.context)
    assert host(LARGE, "10.3") - host(LARGE, "10.13") == pytest.approx(weights / 2)  # the engine as a whole
    table = 2 * LARGE.vocab_size * LARGE.hidden_size
    tied = host(LARGE) - host(LARGE.with_format(None, INT8))
    assert tied > table / 2 * 2.34  # a table of floats counts again


def test_a_note_only_where_the_profile_has_too_little() -> None:
    nano = load_profile("jetson-orin-nano-4gb")
    assert note_of_build(LARGE, nano, TASK, "fp16") is None
    huge = replace(LARGE, layers=LARGE.layers * 10)
    assert "jetson-orin-nano-4gb needs about" in note_of_build(huge, nano, TASK, "fp16")
    assert note_of_build(huge, L4, TASK, "fp16") is None
