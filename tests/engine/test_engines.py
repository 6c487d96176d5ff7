"""The engines behind one interface: what each measures, builds or estimates, and which figure stands for what."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeprune.engine.engines import BuiltAhead, Estimated, Exported, OnnxRuntime, TensorRT
from edgeprune.engine.estimate import estimate_performance, workspace_bytes
from edgeprune.engine.onnx.graph import GraphFiles
from edgeprune.errors import EngineError
from edgeprune.ondevice.durations import VARIABLE
from edgeprune.ondevice.figures import Built, Estimate, Measured, Workload
from edgeprune.ondevice.measure import LocalSession
from edgeprune.ondevice.reference import write_reference
from edgeprune.ondevice.worker import quiet
from edgeprune.precision import WEIGHT_FORMATS
from edgeprune.profiles import load_profile, with_tensorrt
from tests.support.doubles.double_device import Device
from tests.support.doubles.install import MODEL, PRIMITIVE, VERSION, WORKLOAD, InProcess, on_the_processor
from tests.support.durations import durations
from tests.support.reference import decoder_of
from tests.support.shapes import uniform

pytest_plugins = ("tests.support.doubles.fixtures",)

SMALL = uniform(48, 2, (6, 2, 8), 64, 101)
TASK = Workload(batch=1, prompt=16, context=64)
RESULT = {
    "version": "1.7.1",
    "weights_bytes": 1000,
    "activation_bytes": 200,
    "scratch_bytes": 30,
    "seconds": 4.0,
    "peak_build_bytes": 2**20,
    "warnings": ["it stores something twice"],
}


def exported(folder: Path, decoder=SMALL) -> Exported:
    (folder / "onnx").mkdir()
    return Exported(decoder, folder / "onnx", folder / "engine", folder / "reference.npz")


@dataclass
class Answers:
    """A session with given answers, by what is asked."""

    given: dict[str, Any]
    requests: list[dict[str, Any]] = field(default_factory=list)

    def run(self, request: dict[str, Any], timeout_seconds: float, on_progress: object) -> dict[str, Any]:
        self.requests.append(request)
        if isinstance(answer := self.given[request["do"]], EngineError):
            raise answer
        return answer


def test_the_estimator_needs_the_decoder_alone(tmp_path: Path) -> None:
    profile = load_profile("jetson-orin")
    engine = Estimated(profile, TASK, "fp16", "nothing is installed")
    found = engine.performance(exported(tmp_path), None, quiet)
    assert found == estimate_performance(SMALL, profile, TASK, "fp16")
    assert not engine.builds
    assert not engine.measures
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize(("device", "sm"), [("l4", 89), ("jetson-orin", 86)], ids=["its own", "the nearest"])
def test_an_engine_built_ahead_gives_memory_and_leaves_latency_estimated(
    device: str, sm: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the builder says counts as built for the device's own SM, and as an estimate for another."""
    answers, profile = Answers({"build": RESULT}), load_profile(device)
    monkeypatch.setattr(LocalSession, "run", lambda self, *words: answers.run(*words))
    candidate = exported(tmp_path)
    found = BuiltAhead(profile, TASK, "fp16", "no GPU", sm).performance(candidate, None, quiet)
    estimated = estimate_performance(SMALL, profile, TASK, "fp16")
    (request,) = answers.requests
    plan, is_own = Path(request["outputs"]["plan"]), sm == profile.sm
    assert request["workspace_bytes"] == workspace_bytes(SMALL, profile, TASK, "fp16")
    assert (request["sm"], Path(request["files"]["graph"]).parent) == (sm, tmp_path / "onnx")
    assert (found.memory.weights.value, found.memory.activations.value) == (1000, 230)
    assert BuiltAhead(profile, TASK, "fp16", "no GPU", sm).context_bytes(candidate, TASK, quiet) == 230
    assert {type(found.memory.weights), type(found.memory.activations)} == {Built if is_own else Estimate}
    assert found.memory.cache == estimated.memory.cache
    assert (found.prefill, found.decode) == (estimated.prefill, estimated.decode)
    assert found.notes == (*estimated.notes, *(["it stores something twice"] if is_own else []))  # shipped or a check
    (where,) = found.conditions
    assert where == ("engine" if is_own else "feasibility")
    assert ("the nearest to SM 87" in found.conditions[where]) != is_own
    assert plan.parent.exists() == is_own
    assert (plan == tmp_path / "engine" / "model.sm89.engine") == is_own


def test_a_build_that_the_memory_does_not_hold_is_refused_before_anything_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the device by what it has and by the profile's figure, its free swap added; here by what this machine has."""
    answers, profile, candidate = Answers({"build": RESULT}), load_profile("jetson-orin"), exported(tmp_path)
    for state, build_gb in (({"available": 2**28}, 60.0), ({"available": 2**34}, 0.25)):
        limited = profile.model_copy(
            update={"build_memory": profile.build_memory.model_copy(update={"value": build_gb})}
        )
        engine = TensorRT(limited, TASK, "fp16", "", "tensorrt", answers, state=state, where="ssh://orin")
        with pytest.raises(EngineError, match=r"ssh://orin has (256.0|238.4) MiB for it") as error:
            engine.context_bytes(candidate, TASK, quiet)
        assert "swap" in error.value.remedy
        with pytest.raises(EngineError, match="ssh://orin has"):
            engine.check_build(SMALL)
        assert not answers.requests
        with_swap = replace(engine, state=state | {"swap_free": 2**30})
        with_swap.check_build(SMALL)
        assert with_swap.context_bytes(candidate, TASK, quiet) == 230
        assert answers.requests.pop()["workspace_bytes"] <= 2**28 + 2**30
    monkeypatch.setattr("edgeprune.ondevice.machine.memory_state", lambda: {"available": 2**27})
    own = BuiltAhead(load_profile("l4"), TASK, "fp16", "no GPU", 89)
    with pytest.raises(EngineError, match="this machine has 128.0 MiB for it"):
        own.performance(candidate, None, quiet)
    with pytest.raises(EngineError, match="this machine has"):
        own.check_build(SMALL)
    other = BuiltAhead(profile, TASK, "fp16", "no GPU", 86)
    other.check_build(SMALL)  # a check only
    assert any("this machine has 128.0 MiB" in note for note in other.performance(candidate, None, quiet).notes)


def test_an_engine_that_dequantises_its_weights_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a dense model in floats alone: of one with formats the figures say nothing."""
    profile, largest = load_profile("l4"), 2 * 2 * 64 * 48  # gate and up in fp16
    answers = Answers({"build": RESULT})
    monkeypatch.setattr(LocalSession, "run", lambda self, *words: answers.run(*words))
    engine, dense = BuiltAhead(profile, TASK, "fp16", "no GPU", 89), exported(tmp_path)
    plain = engine.performance(dense, None, quiet)
    candidate = replace(dense, decoder=SMALL.with_format(WEIGHT_FORMATS["int8"]))
    for more, is_noted in ((0, False), (largest // 2, False), (2**20, True)):
        answers.given["build"] = RESULT | {"activation_bytes": RESULT["activation_bytes"] + more}
        notes = engine.performance(candidate, (dense, plain), quiet).notes
        assert any("dequantises int8 into copies" in note and "1 MiB of" in note for note in notes) == is_noted
        assert engine.performance(dense, (dense, plain), quiet).notes == plain.notes
        assert engine.performance(candidate, (candidate, plain), quiet).notes == plain.notes


def test_a_check_that_fails_is_a_note_and_a_build_that_fails_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = Answers({"build": EngineError("no kernel for Attention", "Use --precision fp16.")})
    monkeypatch.setattr(LocalSession, "run", lambda self, *words: answers.run(*words))
    candidate = exported(tmp_path)
    orin, l4 = load_profile("jetson-orin"), load_profile("l4")
    found = BuiltAhead(orin, TASK, "fp16", "", 86).performance(candidate, None, quiet)
    estimated = estimate_performance(SMALL, orin, TASK, "fp16")
    assert replace(found, notes=estimated.notes) == estimated
    assert found.notes[-1].endswith("could not compile the graph for SM 86, as a check: no kernel for Attention")
    assert BuiltAhead(orin, TASK, "fp16", "", 86).context_bytes(candidate, TASK, quiet) is None
    with pytest.raises(EngineError, match="no kernel"):
        BuiltAhead(l4, TASK, "fp16", "", 89).performance(candidate, None, quiet)
    with pytest.raises(EngineError, match="no kernel"):
        BuiltAhead(l4, TASK, "fp16", "", 89).context_bytes(candidate, TASK, quiet)


def interval(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.125, "high": value + 0.125}


def test_a_candidate_on_the_processor_is_the_dense_figure_times_its_ratio(tmp_path: Path) -> None:
    """The candidate's own milliseconds are those of a busier machine: only the ratio counts."""
    timed = {"median": interval(9.0), "ratio": interval(0.5), "percentiles": {"p50": 9.0}}
    latency = {kind: {"candidate": timed} for kind in ("prefill", "decode")}
    answers = Answers(
        {
            "check": {"cosine": 1.0, "error": 0.0, "equal": 1.0, "positions": 9},
            "measure": latency | {"device": "a board", "conditions": {}},
            "memory": {"peak": 10**9, "baseline": 10**8},
        }
    )
    candidate = exported(tmp_path)
    np.savez(candidate.reference, cache="float")
    engine = OnnxRuntime(load_profile("cpu"), TASK, "fp32", "", answers)
    alone = engine.performance(candidate, None, quiet)
    assert (alone.decode.value, alone.decode_ratio) == (9.0, None)
    dense = replace(alone, prefill=Measured(40.0, "ms", "a board", 39, 41), decode=Measured(4.0, "ms", "a board", 3, 5))
    beside = engine.performance(candidate, (candidate, dense), quiet)
    assert (beside.prefill.value, beside.decode.value, beside.decode_ratio.value) == (20.0, 2.0, 0.5)
    assert (beside.decode.low, beside.decode.high) == (1.5, 2.5)
    assert [request["do"] for request in answers.requests] == ["check", "measure", "memory"] * 2
    assert set(answers.requests[-2]["files"]) == {"dense", "candidate"}


def test_latencies_are_asked_for_by_name_and_an_identity_by_version(tmp_path: Path) -> None:
    ratio = {"ratio": interval(0.75), "median": interval(3.0)}
    modules = {"numpy": "2", "onnxruntime": "1.20"}
    answers = Answers(
        {
            "measure": {kind: {"a": ratio, "b": ratio} for kind in ("prefill", "decode")} | {"device": "a board"},
            "describe": {"processor": "ARMv8", "machine": "a board", "modules": modules, "gpu": None},
        }
    )
    engine = OnnxRuntime(load_profile("cpu"), TASK, "fp32", "", answers)
    assert engine.identity(quiet) == {"processor": "ARMv8", "onnxruntime": "1.20"}
    candidate = exported(tmp_path)
    found = engine.latencies({"a": candidate, "b": candidate}, quiet)
    assert found == {kind: {"a": 1.0, "b": 0.75} for kind in ("prefill", "decode")}  # relative to the first


@pytest.mark.parametrize("layer", ["pycuda"])
def test_on_a_double_both_models_have_the_dense_ones_runtime(
    device: Device, layer: str, graphs: dict[str, GraphFiles], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, durations(measure_seconds=0.4, survey_seconds=0.2)[VARIABLE])
    files = graphs["fp16"]
    reference = tmp_path / "reference.npz"
    write_reference(on_the_processor(graphs["fp32"], 1), np.arange(40), reference)
    candidate = Exported(decoder_of(MODEL.config), files.graphs[PRIMITIVE].parent, tmp_path / "engine", reference)
    profile, session = with_tensorrt(load_profile("jetson-orin"), "10.3"), InProcess()
    engine = TensorRT(profile, WORKLOAD, "fp16", "", "tensorrt", session)
    alone = engine.performance(candidate, None, quiet)
    assert session.done == ["build", "check", "measure"]
    assert (tmp_path / "engine" / "model.sm87.engine").is_file()
    assert alone.conditions["engine"].startswith(f"tensorrt {VERSION}")
    runtime = Measured(123.0, "bytes", "the dense one", 123.0, 123.0)
    dense = replace(alone, memory=replace(alone.memory, runtime=runtime))
    beside = engine.performance(candidate, (candidate, dense), quiet)
    assert beside.memory.runtime == runtime
    assert beside.memory.weights == replace(alone.memory.weights, basis=beside.memory.weights.basis)
    assert engine.context_bytes(candidate, WORKLOAD, quiet) == 3 * 2**19  # what the builder says
    latencies = engine.latencies({"a": candidate}, quiet)
    assert latencies["decode"]["a"] == pytest.approx(alone.decode.value, rel=0.05)
