"""bf16 graphs: valid by the standard, built by TensorRT for RTX, and as accurate as bf16 is.

ONNX Runtime has no bf16 on a processor: what runs here is the graph with each node's output rounded to bf16 (the
doubles' `emulated`), and the onnxruntime dialect, which computes in fp32 on the bf16 weights.
"""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from transformers import LlamaForCausalLM

from edgeprune.engine.onnx.graph import GraphFiles, GraphVariant, graph_weight_bytes, write_graphs
from edgeprune.errors import EngineError
from edgeprune.model.load import load_model
from edgeprune.ondevice.onnxruntime import GraphRunner as ProcessorRunner
from edgeprune.ondevice.reference import compare_logits, judge_logits, read_reference, write_reference
from edgeprune.ondevice.tensorrt import available, compile_plan
from edgeprune.ondevice.tensorrt_runner import EngineRunner
from edgeprune.ondevice.worker import quiet
from tests.support.doubles.double_bf16 import emulated
from tests.support.doubles.double_device import Device
from tests.support.doubles.double_tensorrt_builder import whole
from tests.support.doubles.install import MODEL, PRIMITIVE, RUNTIME, WORKLOAD, built
from tests.support.families import CASES, save_family
from tests.support.graph_models import VARIANTS, reference_logits, run_steps, sample
from tests.support.graph_nodes import refused_types
from tests.support.reference import decoder_of, weights_of

pytest_plugins = ("tests.support.doubles.fixtures",)

STANDARD = [variant for variant in VARIANTS if variant.dialect != "onnxruntime"]
OPSET23 = GraphVariant("opset23", "last")
IDS = np.random.default_rng(2).integers(0, 200, 28)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> GraphFiles:
    folder = tmp_path_factory.mktemp("bf16")
    return write_graphs(decoder_of(MODEL.config), weights_of(MODEL), folder, "bf16", VARIANTS)


def rounded() -> LlamaForCausalLM:
    model = copy.deepcopy(MODEL)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return model


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_operator_admits_bf16_in_both_opsets(case: str, tmp_path: Path) -> None:
    save_family(tmp_path / "model", case)
    model = load_model(str(tmp_path / "model"))
    files = write_graphs(model.decoder, model.weights, tmp_path / "graphs", "bf16", STANDARD)
    for path in files.graphs.values():
        onnx.checker.check_model(str(path), full_check=True)
        found = onnx.load(path, load_external_data=False)
        assert refused_types(found) == []
        assert {one.data_type for one in found.graph.initializer if one.external_data} == {TensorProto.BFLOAT16}
        logits, *caches = (value.type.tensor_type.elem_type for value in found.graph.output)
        assert logits == TensorProto.FLOAT
        assert set(caches) == {TensorProto.BFLOAT16}


def test_onnx_runtime_computes_in_fp32_on_the_same_weights(files: GraphFiles) -> None:
    """The logits of transformers' own model whose weights were rounded."""
    batch = sample(20)
    expected = reference_logits(rounded(), batch)
    (found,) = run_steps(files.graphs[GraphVariant("onnxruntime", "all")], batch, [20], capacity=24)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[batch.mask == 1], expected[batch.mask == 1], atol=1e-3)


@pytest.mark.parametrize("variant", [GraphVariant("opset23", "all"), GraphVariant("primitive", "all")])
def test_rounded_at_every_node_it_errs_as_transformers_in_bf16_does(
    files: GraphFiles, variant: GraphVariant, tmp_path: Path
) -> None:
    """transformers' own model in bf16 rounds in other places; both err as much against fp32, within a factor."""
    batch = sample(20)
    graph = emulated(whole(files.graphs[variant]))
    (tmp_path / "emulated.onnx").write_bytes(graph.SerializeToString())
    (found,) = run_steps(tmp_path / "emulated.onnx", batch, [20])
    half = copy.deepcopy(MODEL).bfloat16()
    half.model.rotary_emb.inv_freq = MODEL.model.rotary_emb.inv_freq  # which stays fp32 in a model that is loaded
    theirs, exact = reference_logits(half, batch), reference_logits(rounded(), batch)
    errors = [np.abs(logits - exact)[batch.mask == 1].max() for logits in (found, theirs)]
    assert 0.3 * errors[1] < errors[0] < 1.5 * errors[1]


def test_on_a_double_a_bf16_engine_keeps_its_cache_as_bits(device: Device, files: GraphFiles, tmp_path: Path) -> None:
    """Prompt in parts, then steps; the logits are fp32, and near those of the same weights in fp32."""
    reference = tmp_path / "reference.npz"
    write_reference(ProcessorRunner(files.graphs[RUNTIME], 1, 48, threads=1), IDS, reference)
    ids, expected = read_reference(reference)
    with EngineRunner(built(files.graphs[PRIMITIVE], tmp_path / "plan"), 1, 28, "tensorrt") as runner:
        logits = runner.run(ids[:, :5])
        assert logits.dtype == np.float32
        assert not (logits.view(np.uint32) & 0xFFFF).any()  # cast from bf16
        assert runner.cache_bytes == 2 * 3 * 2 * 2 * 28 * 16 * 2  # halves, layers, key and value, heads, bytes
        runner.reset()
        found = compare_logits(runner, ids, expected, quiet)
    assert found["positions"] == 9
    assert "equal at" in judge_logits(found, "bf16", "plan")


@pytest.mark.skipif(not available("tensorrt-rtx")[0], reason="TensorRT for RTX is not installed")
@pytest.mark.parametrize("variant", [OPSET23, PRIMITIVE], ids=lambda variant: variant.dialect)
def test_tensorrt_builds_it_and_holds_each_weight_once(
    files: GraphFiles, variant: GraphVariant, tmp_path: Path
) -> None:
    weights = graph_weight_bytes(decoder_of(MODEL.config), "bf16", variant.dialect)
    result = compile_plan(files.graphs[variant], tmp_path / "plan", WORKLOAD, 86, "tensorrt-rtx")
    assert weights <= result.weights_bytes <= 1.01 * weights
    with pytest.raises(EngineError, match="sm75") as caught:
        compile_plan(files.graphs[variant], tmp_path / "plan", WORKLOAD, 75, "tensorrt-rtx")
    assert "GPUs before SM 80 have no bf16" in caught.value.remedy
