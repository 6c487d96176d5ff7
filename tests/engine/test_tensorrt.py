"""Builds by TensorRT for RTX without a GPU: figures, errors by name, commands for a device. Nothing runs."""

from __future__ import annotations

import dataclasses
import shlex
import sys
import types
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.engine import tensorrt
from edgeprune.engine.base import Workload
from edgeprune.engine.child import ask
from edgeprune.engine.graph import GraphFiles, Spelling, graph_weight_bytes, write_graphs
from edgeprune.engine.tensorrt import BuildResult, available, compile_plan, import_tensorrt, shapes, trtexec_commands
from edgeprune.errors import EngineError
from tests.engine.graph_models import llama
from tests.reference import decoder_of, weights_of

WORKLOAD = Workload(batch=2, prompt=16, context=64)
PRIMITIVE, RUNTIME = Spelling("primitive", "last"), Spelling("onnxruntime", "last")
MODEL = llama(True)

needs_rtx = pytest.mark.skipif(not available("tensorrt-rtx")[0], reason="TensorRT for RTX is not installed")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> GraphFiles:
    folder = tmp_path_factory.mktemp("graphs")
    return write_graphs(decoder_of(MODEL.config), weights_of(MODEL), folder, "fp16", [PRIMITIVE, RUNTIME])


@needs_rtx
def test_a_build_in_a_child_process(files: GraphFiles, tmp_path: Path) -> None:
    """The plan stands where it was asked for, complete; its weights are the graph's."""
    request = {
        "task": "the build", "graph": str(files.graphs[PRIMITIVE]), "plan": str(tmp_path / "model.engine"),
        "workload": dataclasses.asdict(WORKLOAD), "sm": 86, "flavour": "tensorrt-rtx",
    }  # fmt: skip
    result = BuildResult(**ask("edgeprune.engine.tensorrt", request, 300))
    weights = graph_weight_bytes(decoder_of(MODEL.config), "fp16", "primitive")
    assert weights <= result.weights_bytes <= 1.05 * weights
    assert result.version == import_tensorrt("tensorrt-rtx").__version__
    assert [path.name for path in tmp_path.iterdir()] == ["model.engine"]
    assert (tmp_path / "model.engine").stat().st_size > weights
    assert result.peak_build_bytes > 50 * 2**20  # the library alone
    assert not result.warnings


@needs_rtx
def test_scratch_is_counted_once(files: GraphFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The builder's total activation memory contains the scratch memory: together they are that total."""
    kept: list[list[tuple[int, str]]] = []
    original = tensorrt._logger

    def keep(trt: object) -> tuple[object, list[tuple[int, str]]]:
        logger, messages = original(trt)
        kept.append(messages)
        return logger, messages

    monkeypatch.setattr(tensorrt, "_logger", keep)
    small, large = (
        compile_plan(files.graphs[PRIMITIVE], tmp_path / "plan", workload, 86, "tensorrt-rtx")
        for workload in (WORKLOAD, Workload(batch=2, prompt=32, context=64))
    )
    for messages, result in zip(kept, (small, large), strict=True):
        texts = [text for _, text in messages]
        (total,) = (text for text in texts if text.startswith("Total Activation Memory"))
        assert result.activation_bytes + result.scratch_bytes == int(total.split()[3])
        assert any("BlockAssignment" in text and "requiring" in text for text in texts)
    assert large.scratch_bytes > small.scratch_bytes > 0


@needs_rtx
def test_a_tied_head_is_held_once_at_a_batch_of_one(tmp_path: Path) -> None:
    """Built for one sequence alone it would be held twice, which is most of this model."""
    model = llama(True, vocab_size=4000)
    files = write_graphs(decoder_of(model.config), weights_of(model), tmp_path, "fp16", [PRIMITIVE])
    result = compile_plan(files.graphs[PRIMITIVE], tmp_path / "plan", Workload(1, 16, 64), 86, "tensorrt-rtx")
    assert result.weights_bytes <= 1.05 * graph_weight_bytes(decoder_of(model.config), "fp16", "primitive")
    assert not result.warnings


@needs_rtx
def test_a_graph_that_cannot_be_parsed_names_the_node(files: GraphFiles, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"at node layers\.0\..* \(\w+\)") as caught:
        compile_plan(files.graphs[RUNTIME], tmp_path / "plan", WORKLOAD, 86, "tensorrt-rtx")
    assert caught.value.remedy
    assert not list(tmp_path.iterdir())


@needs_rtx
@pytest.mark.parametrize("content", [None, b"this is no graph"])
def test_a_file_that_is_no_graph_is_named(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "broken.onnx").write_bytes(content)
    with pytest.raises(EngineError, match=r"TensorRT cannot .*broken\.onnx: "):
        compile_plan(tmp_path / "broken.onnx", tmp_path / "plan", WORKLOAD, 86, "tensorrt-rtx")


@needs_rtx
def test_a_device_that_is_not_offered_names_those_that_are(files: GraphFiles, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="SM 87") as caught:
        compile_plan(files.graphs[PRIMITIVE], tmp_path / "plan", WORKLOAD, 87, "tensorrt-rtx")
    assert "75, 80, 86, 89" in caught.value.remedy


def test_full_tensorrt_builds_for_its_own_machine_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for another device it says so, and does not send for TensorRT for RTX."""
    monkeypatch.setitem(sys.modules, "tensorrt", types.ModuleType("double_of_tensorrt"))
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(EngineError, match="for the GPU of its own machine only, not for SM 87") as caught:
        compile_plan(tmp_path / "model.onnx", tmp_path / "plan", WORKLOAD, 87, "tensorrt")
    assert caught.value.remedy == "Build on the device itself."


@needs_rtx
def test_what_is_offered() -> None:
    assert {75, 80, 86, 89, 120} <= set(tensorrt.offered_sms())
    assert available("tensorrt-rtx") == (True, f"tensorrt_rtx {import_tensorrt('tensorrt-rtx').__version__}")


@pytest.mark.parametrize(("flavour", "extra"), [("tensorrt", "tensorrt"), ("tensorrt-rtx", "rtx")])
def test_a_missing_module_says_what_to_install(flavour: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, tensorrt.MODULES[flavour], None)
    found, reason = available(flavour)
    assert not found
    assert flavour in reason
    with pytest.raises(EngineError) as caught:
        import_tensorrt(flavour)
    assert f'pip install "edgeprune[{extra}]"' in caught.value.remedy


def test_weights_that_are_held_twice_are_a_warning(tmp_path: Path) -> None:
    (tmp_path / "model.onnx.data").write_bytes(bytes(1000))
    (tmp_path / "embedding.data").write_bytes(bytes(1000))
    assert tensorrt._warnings(2100, tmp_path / "model.onnx") == ()
    (warning,) = tensorrt._warnings(3000, tmp_path / "model.onnx")
    assert "1.50 times" in warning
    (warning,) = tensorrt._warnings(0, tmp_path / "model.onnx")
    assert "no memory figures" in warning


@given(st.integers(1, 8), st.integers(1, 64), st.integers(1, 64))
def test_one_profile_serves_prefill_and_decode(batch: int, prompt: int, generated: int) -> None:
    """Minimum <= optimum <= maximum in every dimension; prefill, the slowest step and all between are inside."""
    workload = Workload(batch, prompt, prompt + generated)
    inputs = {
        "input_ids": lambda sequence, past: (batch, sequence),
        "position_ids": lambda sequence, past: (batch, sequence),
        "attention_mask": lambda sequence, past: (batch, past + sequence),
        "past_key_values.3.key": lambda sequence, past: (batch, 2, past, 16),
    }
    for name, of in inputs.items():
        low, best, high = shapes(name, (-1, 2, -1, 16), workload)
        assert all(a <= b <= c for a, b, c in zip(low, best, high, strict=True))
        for shape in (of(prompt, 0), of(1, workload.context - 1), of(1, prompt)):
            assert all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))


def test_the_commands_for_a_device() -> None:
    """As a shell reads them: one engine, built once, measured at decode and at prefill."""
    caches = [("past_key_values.0.key", 2, 16), ("past_key_values.0.value", 2, 16)]
    commands = trtexec_commands("onnx/my model.onnx", caches, WORKLOAD, "engine/model.engine")
    build, decode, prefill = (shlex.split(shlex.join(words)) for words in commands)
    assert build == [
        "trtexec", "--onnx=onnx/my model.onnx", "--saveEngine=engine/model.engine",
        "--stronglyTyped", "--skipInference",
        "--minShapes=input_ids:1x1,position_ids:1x1,attention_mask:1x1,"
        "past_key_values.0.key:1x2x0x16,past_key_values.0.value:1x2x0x16",
        "--optShapes=input_ids:2x1,position_ids:2x1,attention_mask:2x32,"
        "past_key_values.0.key:2x2x31x16,past_key_values.0.value:2x2x31x16",
        "--maxShapes=input_ids:2x16,position_ids:2x16,attention_mask:2x79,"
        "past_key_values.0.key:2x2x63x16,past_key_values.0.value:2x2x63x16",
    ]  # fmt: skip
    flags = {"--loadEngine=engine/model.engine", "--useCudaGraph", "--noDataTransfers", "--warmUp=200"}
    assert flags < set(decode)
    assert flags < set(prefill)
    assert decode[-1] == (
        "--shapes=input_ids:2x1,position_ids:2x1,attention_mask:2x64,"
        "past_key_values.0.key:2x2x63x16,past_key_values.0.value:2x2x63x16"
    )
    assert prefill[-1] == (
        "--shapes=input_ids:2x16,position_ids:2x16,attention_mask:2x16,"
        "past_key_values.0.key:2x2x0x16,past_key_values.0.value:2x2x0x16"
    )
