"""What is measured on this machine, as figures with their source; real graphs, real child processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgeprune.engine.onnx.graph import GraphVariant, write_graphs
from edgeprune.errors import BadAnswer, EngineError
from edgeprune.ondevice import measure as perform
from edgeprune.ondevice.figures import Measured, Performance, Workload
from edgeprune.ondevice.worker import OnProgress, quiet
from tests.support.graph_models import llama
from tests.support.reference import decoder_of, weights_of

VARIANT = GraphVariant("onnxruntime", "last")
WORKLOAD = Workload(batch=2, prompt=16, context=64)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`narrow` has an eighth of `wide`'s MLP; both do real work in some milliseconds."""
    found = {}
    for name, intermediate_size in (("wide", 8192), ("narrow", 1024)):
        model = llama(True, hidden_size=192, intermediate_size=intermediate_size)
        folder = tmp_path_factory.mktemp(name)
        files = write_graphs(decoder_of(model.config), weights_of(model), folder, "fp32", [VARIANT])
        found[name] = files.graphs[VARIANT]
    return found


def measure(
    dense: Path | None, candidate: Path, counted: tuple[int, int, int], session: perform.Session | None = None
) -> Performance:
    return perform.in_process(
        session or perform.LocalSession(),
        "onnxruntime",
        dense,
        candidate,
        WORKLOAD,
        perform.Counted(*counted),
        quiet,
        seconds=1.0,
    )


@pytest.mark.timing
def test_a_candidate_beside_the_dense_model(models: dict[str, Path]) -> None:
    found = measure(models["wide"], models["narrow"], (1000, 200, 30))
    for figure in (found.prefill, found.decode, found.prefill_ratio, found.decode_ratio):
        assert isinstance(figure, Measured)
        assert 0 < figure.low <= figure.value <= figure.high
        assert figure.device.endswith("threads")
    assert found.prefill_ratio.value < 1  # of candidate to dense, which does some five times the work
    assert found.decode_ratio.value < 1
    assert (found.prefill.unit, found.prefill_ratio.unit) == ("ms", "1")
    assert found.percentiles["decode"]["p50"] == pytest.approx(found.decode.value)
    assert set(found.percentiles) == {"prefill", "decode"}


@pytest.mark.slow
def test_memory_adds_up_to_the_process_s_peak(models: dict[str, Path]) -> None:
    """The known parts are what was given, the runtime is its own, the rest of the peak are activations."""
    peaks: list[dict] = []

    class Spy(perform.LocalSession):
        def run(self, request: dict, timeout_seconds: float, on_progress: OnProgress) -> dict:
            answer = super().run(request, timeout_seconds, on_progress)
            if request["do"] == "memory":
                peaks.append(answer)
            return answer

    weights = sum(path.stat().st_size for path in models["wide"].parent.glob("*.data"))
    memory = measure(None, models["wide"], (weights, 5000, 300), Spy()).memory
    assert {name: part.value for name, part in memory.parts.items() if name != "activations"} == {
        "weights": weights,
        "cache": 5000,
        "buffers": 300,
        "runtime": peaks[0]["baseline"],
    }
    assert memory.total == peaks[0]["peak"]
    assert memory.activations.value > 0
    assert all(part.unit == "bytes" and part.source == "measured" for part in memory.parts.values())


def test_of_the_dense_model_alone(models: dict[str, Path]) -> None:
    """No ratio; and activations that are never negative, however large the parts that were given."""
    found = measure(None, models["narrow"], (2**40, 0, 0))
    assert (found.prefill_ratio, found.decode_ratio) == (None, None)
    assert found.memory.activations.value == 0


@pytest.mark.slow
def test_ratios_alone(models: dict[str, Path]) -> None:
    ratios = perform.ratios_on_onnxruntime(
        perform.LocalSession(), models["wide"], models["narrow"], WORKLOAD, 1.0, quiet
    )
    assert set(ratios) == {"prefill_ratio", "decode_ratio"}
    assert all(0 < ratio.low <= ratio.value < 1 for ratio in ratios.values())


def test_a_graph_that_is_missing_is_an_engine_error(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="none.onnx") as caught:
        measure(None, tmp_path / "none.onnx", (0, 0, 0))
    assert caught.value.remedy


class Told:
    """A session that answers as it is told."""

    def __init__(self, answer: dict[str, Any]) -> None:
        self._answer = answer

    def run(self, *_: object) -> dict[str, Any]:
        return self._answer


@pytest.mark.parametrize("value", [-5.0, 0, 5e-324, float("nan"), float("inf"), 10**400, True, "2", None])
def test_a_latency_that_no_clock_gives_is_a_failed_measurement(value: Any) -> None:
    timed = {"candidate": {"median": {"value": value, "low": 1.0, "high": 3.0}}}
    session = Told({"prefill": timed, "decode": timed, "device": "a board"})
    with pytest.raises(BadAnswer, match="ms, which is no figure") as caught:
        perform.engine_latencies(session, "tensorrt", Path("model.engine"), Workload(1, 4, 8), 1.0, quiet)
    assert len(caught.value.message) < 150


@pytest.mark.parametrize("value", [-1, float("nan"), 1 << 62, 10**400])
def test_bytes_that_no_memory_has_are_refused(value: Any) -> None:
    sizes = dict.fromkeys(("weights_bytes", "activation_bytes", "scratch_bytes", "peak_build_bytes"), 0)
    session = Told({**sizes, "version": "10.3", "seconds": 1.0, "warnings": [], "peak_build_bytes": value})
    with pytest.raises(BadAnswer, match="bytes, which is no figure"):
        perform.build(session, "tensorrt", Path("model.onnx"), Path("model.engine"), Workload(1, 4, 8), quiet)
