"""Real builds by TensorRT for RTX without a GPU: figures, progress, timings, errors by name. Nothing runs.

Where full TensorRT is needed a double stands for it, and the test's name says so.
"""

from __future__ import annotations

import dataclasses
import sys
import types
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.engine.onnx.graph import GraphFiles, GraphVariant, graph_weight_bytes, write_graphs
from edgeprune.errors import EngineError
from edgeprune.model.decoder import Attention, Layer, Mlp
from edgeprune.ondevice import measure, tensorrt
from edgeprune.ondevice.figures import Workload
from edgeprune.ondevice.runtimes import RUNTIMES
from edgeprune.ondevice.tensorrt import (
    LEAST_COPY,
    BuildResult,
    Limits,
    Messages,
    available,
    compile_plan,
    holds_copies,
    import_tensorrt,
    shapes,
)
from edgeprune.ondevice.worker import OnProgress, quiet
from tests.support.doubles.double_device import Device
from tests.support.doubles.install import install
from tests.support.graph_models import llama
from tests.support.reference import decoder_of, weights_of

WORKLOAD = Workload(batch=2, prompt=16, context=64)
PRIMITIVE, RUNTIME = GraphVariant("primitive", "last"), GraphVariant("onnxruntime", "last")
MODEL = llama(True)

needs_rtx = pytest.mark.skipif(not available("tensorrt-rtx")[0], reason="TensorRT for RTX is not installed")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> GraphFiles:
    folder = tmp_path_factory.mktemp("graphs")
    return write_graphs(decoder_of(MODEL.config), weights_of(MODEL), folder, "fp16", [PRIMITIVE, RUNTIME])


def compiled(
    graph: Path, plan: Path, limits: Limits | None = None, on_progress: OnProgress = quiet, sm: int = 86
) -> BuildResult:
    return compile_plan(graph, plan, WORKLOAD, sm, "tensorrt-rtx", limits or Limits(), on_progress)


@needs_rtx
def test_a_build_in_a_child_process(files: GraphFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan stands where it was asked for, complete; its weights are the graph's; its timings are kept."""
    monkeypatch.setenv("EDGEPRUNE_CACHE", str(tmp_path / "cache"))
    told: list[tuple[str, int, int]] = []
    plan = tmp_path / "engine" / "model.engine"
    result = measure.build(
        measure.LocalSession(),
        "tensorrt-rtx",
        files.graphs[PRIMITIVE],
        plan,
        WORKLOAD,
        lambda *progress: told.append(progress),
        86,
        2**26,
    )
    weights = graph_weight_bytes(decoder_of(MODEL.config), "fp16", "primitive")
    assert weights <= result.weights_bytes <= 1.05 * weights
    assert result.version == import_tensorrt("tensorrt-rtx").__version__
    assert [path.name for path in plan.parent.iterdir()] == ["model.engine"]
    assert plan.stat().st_size > weights
    assert result.peak_build_bytes > 50 * 2**20  # the library alone
    assert not result.warnings
    assert f"with {result.peak_build_bytes / 2**20:.0f} MiB" in result.effort
    assert (tmp_path / "cache" / "tensorrt-rtx-sm86.timings").stat().st_size > 0
    assert told


@needs_rtx
def test_progress_is_told_from_nothing_to_all(files: GraphFiles, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    compiled(files.graphs[PRIMITIVE], tmp_path / "plan", on_progress=lambda *progress: told.append(progress))
    assert all(0 <= done <= total for _, done, total in told)
    assert (told[0][1], told[-1][1]) == (0, told[-1][2])
    for stage in {stage for stage, _, _ in told}:
        steps = [done for name, done, _ in told if name == stage]
        assert steps == sorted(steps)


@needs_rtx
def test_timings_are_kept_and_read_again(files: GraphFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no cache is replaced."""
    kept, opened = tmp_path / "cache" / "kept.timings", []
    original = tensorrt._open_timings

    def spy(config: object, path: Path | None) -> object:
        opened.append(path.read_bytes() if path and path.is_file() else b"")
        return original(config, path)

    monkeypatch.setattr(tensorrt, "_open_timings", spy)
    limits = Limits(timing_cache=kept)
    compiled(files.graphs[PRIMITIVE], tmp_path / "plan", limits)
    written = kept.read_bytes()
    assert written
    compiled(files.graphs[PRIMITIVE], tmp_path / "plan", limits)
    kept.write_bytes(b"no timings")
    compiled(files.graphs[PRIMITIVE], tmp_path / "plan", limits)
    assert opened == [b"", written, b"no timings"]
    assert len(kept.read_bytes()) >= len(written)
    assert [path.name for path in kept.parent.iterdir()] == ["kept.timings"]


@needs_rtx
def test_the_workspace_limit_reaches_the_builder(files: GraphFiles, tmp_path: Path) -> None:
    """The scratch memory that the graph needs does not fit into one KiB; nothing is left then."""
    with pytest.raises(EngineError, match="within workspace limit") as caught:
        compiled(files.graphs[PRIMITIVE], tmp_path / "plan", Limits(workspace_bytes=2**10))
    assert "smaller --context" in caught.value.remedy
    assert not list(tmp_path.iterdir())
    assert compiled(files.graphs[PRIMITIVE], tmp_path / "plan", Limits(2**26)).scratch_bytes <= 2**26


@pytest.mark.slow
@needs_rtx
def test_every_spelling_and_precision_that_the_builder_knows(tmp_path: Path) -> None:
    """With layers of different widths; the Attention operator of opset 23 has no kernel in fp32: it is decomposed."""
    model = llama(True)
    layers = (Layer(Attention(6, 2, 16), None), Layer(None, Mlp(128)), Layer(Attention(6, 2, 16), Mlp(128)))
    decoder = dataclasses.replace(decoder_of(model.config), layers=layers)
    variants = [PRIMITIVE, GraphVariant("opset23", "last"), GraphVariant("opset24", "last")]
    for precision in ("fp16", "fp32"):
        files = write_graphs(decoder, weights_of(model), tmp_path / precision, precision, variants)
        for variant in variants:
            if precision == "fp32":
                with pytest.raises(EngineError, match=r"at node layers\.\d\.\S+: .*Turing") as caught:
                    compiled(files.graphs[variant], tmp_path / "plan", sm=75)
                assert "fp16" in caught.value.remedy
            weights = graph_weight_bytes(decoder, precision)
            assert weights <= compiled(files.graphs[variant], tmp_path / "plan").weights_bytes <= 1.05 * weights


@needs_rtx
def test_a_release_that_decomposes_no_attention_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt, "_let_attention_decompose", lambda *_: None)
    model, variant = llama(True), GraphVariant("opset23", "last")
    files = write_graphs(decoder_of(model.config), weights_of(model), tmp_path / "fp32", "fp32", [variant])
    with pytest.raises(EngineError, match="Attention operation was not supported") as caught:
        compiled(files.graphs[variant], tmp_path / "plan")
    assert "primitive" in caught.value.remedy
    assert "at node head" not in caught.value.message  # it speaks of multi-head attention


@needs_rtx
def test_scratch_is_counted_once(files: GraphFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The builder's total activation memory contains the scratch memory: together they are that total."""
    kept: list[Messages] = []

    class Spy(Messages):
        def __init__(self, trt: object) -> None:
            super().__init__(trt)
            kept.append(self)

    monkeypatch.setattr(tensorrt, "Messages", Spy)
    small, large = (
        compile_plan(files.graphs[PRIMITIVE], tmp_path / "plan", workload, 86, "tensorrt-rtx")
        for workload in (WORKLOAD, Workload(batch=2, prompt=32, context=64))
    )
    for messages, result in zip(kept, (small, large), strict=True):
        texts = [text for _, text in messages.kept]
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


@pytest.mark.parametrize(
    ("errors", "node"),
    [
        ("Could not find any implementation for node layers.1.mlp.down.", " at node layers.1.mlp.down"),
        ("{ForeignNode[layers.1.mlp.down...head]}", " at node layers.1.mlp.down"),
        ("Cannot compile operation 'layers.1.mlp.down_U18' for Turing", " at node layers.1.mlp.down"),
        ("layers.1.mlp.downward failed, layers.11.mlp.down.2 too", ""),
        ("see multi-head attention, https://docs.nvidia.com/head/", ""),
        ("/layers.1.mlp.down of another graph; head: no tactic", " at node head"),
    ],
)
def test_the_node_is_the_one_that_the_errors_name_in_full(errors: str, node: str) -> None:
    assert tensorrt._blamed(errors, ["head", "layers.1.mlp", "layers.1.mlp.down"]) == node


def test_on_a_double_a_builder_s_error_names_the_node(
    files: GraphFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, Device(), ())
    with pytest.raises(EngineError, match=r"cannot build .* at node \w+\S*: .*Could not find any implementation"):
        compile_plan(files.graphs[PRIMITIVE], tmp_path / "plan", WORKLOAD, None, "tensorrt", Limits(0))
    assert not list(tmp_path.iterdir())


def test_on_a_double_timings_of_another_gpu_are_not_used(
    files: GraphFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = Limits(timing_cache=tmp_path / "kept.timings")
    for sm in (86, 87, 87):
        install(monkeypatch, Device(sm=sm), ())
        compile_plan(files.graphs[PRIMITIVE], tmp_path / "plan", WORKLOAD, None, "tensorrt", limits)
        kept = limits.timing_cache.read_text()
        assert f"sm{sm}:MatMul" in kept
        assert kept.count("MatMul") == 1


@needs_rtx
def test_what_is_offered() -> None:
    assert {75, 80, 86, 89, 120} <= set(tensorrt.offered_sms())
    assert available("tensorrt-rtx") == (True, f"tensorrt_rtx {import_tensorrt('tensorrt-rtx').__version__}")


@pytest.mark.parametrize(("flavour", "extra"), [("tensorrt", "tensorrt"), ("tensorrt-rtx", "rtx")])
def test_a_missing_module_says_what_to_install(flavour: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, RUNTIMES[flavour].module, None)
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
    assert tensorrt._warnings(3000, tmp_path / "elsewhere" / "model.onnx") == ()  # weights inside of the graph


@given(st.integers(0, 2**40), st.integers(LEAST_COPY + 1, 2**40), st.floats(-0.5, 0.5))
def test_a_copy_of_the_largest_matrix_shows_and_what_builds_vary_by_does_not(
    plain: int, largest: int, share: float
) -> None:
    assert holds_copies(plain + largest, plain, largest, largest // 4)
    assert not holds_copies(plain + int(share * largest), plain, largest, 0)
    assert not holds_copies(plain + largest, plain, 0, 0)  # nothing has a format
    assert not holds_copies(plain + LEAST_COPY, plain, 1, 0)


@given(st.integers(0, 2**40), st.integers(1, 2**30), st.integers(1, 2**30))
def test_two_streams_of_a_prefill_are_no_copy_however_small_the_matrices(plain: int, largest: int, stream: int) -> None:
    """What fused products keep of them differs by the format."""
    assert not holds_copies(plain + 2 * stream, plain, largest, stream)
    assert holds_copies(plain + 2 * stream + largest + LEAST_COPY, plain, largest, stream)


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
        asked = (-1, 2, -1, 16) if name.startswith("past") else (-1, -1)
        low, best, high = shapes(name, asked, workload)
        assert all(a <= b <= c for a, b, c in zip(low, best, high, strict=True))
        for shape in (of(prompt, 0), of(1, workload.context - 1), of(1, prompt)):
            assert all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))


def test_a_cache_in_place_has_one_length_in_all_shapes() -> None:
    """What the graph states as a number is neither a minimum nor a maximum; the batch and the new tokens are."""
    workload = Workload(3, 8, 48)
    assert shapes("past_key_values.0.key", (-1, 2, 48, 16), workload) == ((1, 2, 48, 16), *[(3, 2, 48, 16)] * 2)
    assert shapes("attention_mask", (-1, 48), workload, most=4) == ((1, 48), (3, 48), (4, 48))
    assert shapes("write_indices", (-1,), workload) == ((1,), (3,), (3,))
    assert shapes("input_ids", (-1, -1), workload) == ((1, 1), (3, 1), (3, 8))
