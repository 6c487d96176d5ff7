"""The runner against transformers' logits; what is measured, and in which process."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from edgeprune.engine.onnx.graph import GraphVariant, write_graphs
from edgeprune.errors import EngineError
from edgeprune.ondevice.figures import Workload
from edgeprune.ondevice.onnxruntime import GraphRunner, measure_latency
from edgeprune.ondevice.worker import ask
from edgeprune.precision import WEIGHT_FORMATS
from tests.support.graph_models import llama, reference_logits, sample
from tests.support.reference import decoder_of, weights_of
from tests.support.roundings import INT8, numbers, rounded

MODEL = llama(True)
VARIANT = GraphVariant("onnxruntime", "last")


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One random model in both precisions."""
    found = {}
    for precision in ("fp32", "fp16"):
        folder = tmp_path_factory.mktemp(precision)
        files = write_graphs(decoder_of(MODEL.config), weights_of(MODEL), folder, precision, [VARIANT])
        found[precision] = files.graphs[VARIANT]
    return found


def padded(tokens: int):
    """Two sequences, the second padded on the left; positions follow from the mask."""
    batch = sample(tokens)
    positions = np.maximum(batch.mask.cumsum(1) - 1, 0)
    return type(batch)(batch.ids, batch.mask, positions)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("fp16", 1e-2)])
def test_steps_give_transformers_logits(graphs: dict[str, Path], precision: str, tolerance: float) -> None:
    """A prefill, a step of several tokens, then one by one up to the last place in the cache."""
    batch = padded(24)
    expected = reference_logits(MODEL, batch)
    runner = GraphRunner(graphs[precision], 2, batch.tokens)
    start = 0
    for end in (12, 16, *range(17, 25)):
        logits = runner.run(batch.ids[:, start:end], batch.mask[:, :end])
        error = np.abs(logits - expected[:, end - 1]).max() / np.abs(expected[:, end - 1]).max()
        assert error < tolerance
        start = end
    assert runner.past == batch.tokens


@pytest.mark.parametrize("layers", ["int8", "int4-32", "int4-32-asymmetric"])
def test_codes_are_run_exactly_or_on_rounded_inputs(layers: str, tmp_path: Path) -> None:
    """Exactly they are the floats that they stand for; as deployed, inputs are rounded to 8 bits."""
    decoder = decoder_of(MODEL.config).with_format(WEIGHT_FORMATS[layers], INT8)
    stored, batch = rounded(decoder, weights_of(MODEL)), sample(12)
    graph = write_graphs(decoder, stored, tmp_path / "codes", "fp32", [VARIANT]).graphs[VARIANT]
    floats = decoder.with_format(None), numbers(stored)
    plain = write_graphs(*floats, tmp_path / "floats", "fp32", [VARIANT]).graphs[VARIANT]
    wanted = GraphRunner(plain, 2, 12).run(batch.ids)
    exact, deployed = (GraphRunner(graph, 2, 12, exact=exact).run(batch.ids) for exact in (True, False))
    errors = [np.abs(found - wanted).max() / np.abs(wanted).max() for found in (exact, deployed)]
    assert errors[0] < 1e-5
    assert 1e-3 < errors[1] < 0.2  # of a model of random weights, which errs more than a trained one


def test_a_reset_forgets_what_the_cache_held(graphs: dict[str, Path]) -> None:
    batch, other = padded(12), sample(20)
    fresh = GraphRunner(graphs["fp32"], 2, 32).run(batch.ids, batch.mask)
    runner = GraphRunner(graphs["fp32"], 2, 32)
    runner.run(other.ids)
    runner.reset()
    np.testing.assert_array_equal(runner.run(batch.ids, batch.mask), fresh)


def test_a_session_holds_another_number_of_sequences(graphs: dict[str, Path]) -> None:
    batch, runner = sample(12), GraphRunner(graphs["fp32"], 1, 12)
    runner.run(batch.ids[:1])
    one = runner.cache_bytes
    runner.hold(len(batch.ids))
    assert runner.cache_bytes == len(batch.ids) * one
    np.testing.assert_array_equal(runner.run(batch.ids), GraphRunner(graphs["fp32"], 2, 12).run(batch.ids))


def test_without_a_mask_every_token_counts(graphs: dict[str, Path]) -> None:
    batch = sample(12)
    masked = GraphRunner(graphs["fp32"], 2, 12).run(batch.ids, np.ones_like(batch.ids))
    np.testing.assert_array_equal(GraphRunner(graphs["fp32"], 2, 12).run(batch.ids), masked)


def test_a_full_cache_is_refused(graphs: dict[str, Path]) -> None:
    runner = GraphRunner(graphs["fp32"], 1, 8)
    runner.run(np.zeros((1, 7), np.int64))
    with pytest.raises(EngineError, match="9 tokens do not fit into the cache of 8"):
        runner.run(np.zeros((1, 2), np.int64))
    assert runner.past == 7


def test_a_failing_step_is_an_engine_error(graphs: dict[str, Path]) -> None:
    with pytest.raises(EngineError, match="failed at a step of 1 x 1 tokens") as caught:
        GraphRunner(graphs["fp32"], 1, 8).run(np.array([[10_000]]))
    assert caught.value.remedy


def test_a_broken_graph_is_an_engine_error(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"this is no graph")
    with pytest.raises(EngineError, match="cannot load"):
        GraphRunner(tmp_path / "model.onnx", 1, 8)


def test_latency_is_measured_at_the_workload_s_shapes(graphs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill runs the prompt from an empty cache, decode one token at past = context - 1; of both graphs."""
    seen: dict[int, set[tuple[int, tuple[int, ...]]]] = {}
    run = GraphRunner.run

    def spy(runner: GraphRunner, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        seen.setdefault(id(runner), set()).add((runner.past, ids.shape))
        return run(runner, ids, mask)

    monkeypatch.setattr(GraphRunner, "run", spy)
    found = measure_latency({"dense": graphs["fp32"], "candidate": graphs["fp16"]}, Workload(3, 10, 40), 0.1)
    assert list(seen.values()) == [{(0, (3, 10)), (39, (3, 1))}] * 2
    for kind in ("prefill", "decode"):
        for name in ("dense", "candidate"):
            median, percentiles = found[kind][name]["median"], found[kind][name]["percentiles"]
            assert 0 < median["low"] <= median["value"] <= median["high"]
            assert median["value"] == pytest.approx(percentiles["p50"])
            assert percentiles["p50"] <= percentiles["p90"] <= percentiles["p99"]
        ratio = found[kind]["candidate"]["ratio"]
        assert ratio["low"] <= ratio["value"] <= ratio["high"]


def test_one_graph_has_no_ratio(graphs: dict[str, Path]) -> None:
    found = measure_latency({"candidate": graphs["fp32"]}, Workload(1, 4, 8), 0.1)
    assert set(found) == {"prefill", "decode"}
    assert all(set(kind) == {"candidate"} for kind in found.values())


def memory_task(graph: Path, workload: Workload) -> dict:
    request = {
        "task": "the test",
        "do": "memory",
        "engine": "onnxruntime",
        "workload": asdict(workload),
        "files": {"candidate": str(graph)},
    }
    return ask("edgeprune.ondevice.tasks", request, 120)


def test_memory_is_measured_in_a_process_of_its_own(graphs: dict[str, Path]) -> None:
    memory = memory_task(graphs["fp32"], Workload(1, 8, 16))
    assert 2**20 < memory["baseline"] < memory["peak"]


def test_the_whole_cache_counts_as_memory(tmp_path: Path) -> None:
    """96 MiB of cache that no step writes but at its ends: pages that nobody wrote would be no memory, and no work."""
    context, bytes_a_token = 2**17, 3 * 2 * 2 * 16 * 4
    model = llama(True, max_position_embeddings=context)
    graph = write_graphs(decoder_of(model.config), weights_of(model), tmp_path, "fp32", [VARIANT]).graphs[VARIANT]
    memory = memory_task(graph, Workload(1, 1, context))
    assert memory["peak"] - memory["baseline"] > context * bytes_a_token


def test_a_graph_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="none.onnx") as caught:
        memory_task(tmp_path / "none.onnx", Workload(1, 8, 16))
    assert caught.value.remedy
