"""Whether a wrong engine is found out. Engines run on doubles of TensorRT and CUDA: no test here ran on a GPU."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgeprune.engine.onnx.graph import GraphFiles, write_graphs
from edgeprune.errors import EngineError, WrongEngine
from edgeprune.ondevice import machine, measure
from edgeprune.ondevice.figures import Built, Estimate, Measured, Workload
from edgeprune.ondevice.onnxruntime import GraphRunner as ProcessorRunner
from edgeprune.ondevice.reference import (
    PROMPT,
    ROUNDED_INPUTS,
    STEPS,
    codes_of,
    compare_logits,
    judge_logits,
    read_reference,
    write_reference,
)
from edgeprune.ondevice.tensorrt_runner import EngineRunner
from edgeprune.ondevice.worker import quiet
from edgeprune.precision import PRECISIONS, WEIGHT_FORMATS
from tests.support.doubles.double_device import Device
from tests.support.doubles.double_tensorrt import CONTEXT_BYTES
from tests.support.doubles.fixtures import IDS
from tests.support.doubles.install import MODEL, PRIMITIVE, RUNTIME, VERSION, WORKLOAD, InProcess, built
from tests.support.graph_pictures import SIDE, drawn, llamagen, random_weights
from tests.support.reference import decoder_of, weights_of
from tests.support.shapes import uniform

pytest_plugins = ("tests.support.doubles.fixtures",)

RUNTIME_FIGURE = Estimate(1e6, "bytes", "a device", "by hand")


class Saying:
    """A double of a runner that answers with logits that were given."""

    batch, capacity = 1, 10**6

    def __init__(self, logits: np.ndarray) -> None:
        self._logits, self.asked, self.ids = logits, [], []

    def reset(self, past: int = 0) -> None:
        self.asked.clear()

    def run(self, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        self.asked.append(ids.shape[1])
        self.ids.extend(ids[0])
        return self._logits[len(self.asked) - 1][None]


def test_on_a_double_an_engine_has_its_graph_s_logits(
    device: Device, graphs: dict[str, GraphFiles], precision: str, reference: Path, tmp_path: Path
) -> None:
    told: list[tuple[int, int]] = []
    ids, expected = read_reference(reference)
    assert (ids.shape, expected.shape) == ((1, 28), (9, 200))
    with EngineRunner(built(graphs[precision].graphs[PRIMITIVE], tmp_path / "plan"), 1, 28, "tensorrt") as runner:
        found = compare_logits(runner, ids, expected, lambda _, done, total: told.append((done, total)))
    assert told == [(step, 9) for step in range(1, 10)]
    assert found["positions"] == 9
    assert found["cosine"] > (0.999999 if precision == "fp32" else 0.9999)
    assert 0 < found["error"] < (1e-5 if precision == "fp32" else 0.02)
    assert "checked" not in judge_logits(found, precision, "model.engine")


def test_on_a_double_a_performance_is_checked_built_and_measured(
    device: Device,
    graphs: dict[str, GraphFiles],
    layer: str,
    reference: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each figure with its source: the builder's weights, what the GPU held, what its clock said."""
    monkeypatch.setattr(machine, "used_memory", lambda: device.used + 10**6 * device.retained)
    session, told = InProcess(), []
    graph, plan = graphs["fp16"].graphs[PRIMITIVE], tmp_path / "model.engine"
    result = measure.build(
        session, "tensorrt", graph, plan, WORKLOAD, lambda *progress: told.append(progress), workspace_bytes=2**20
    )
    assert ("Building ENGINE_0", 3, 3) in told
    found = measure.on_tensorrt(
        session, "tensorrt", plan, result, WORKLOAD, RUNTIME_FIGURE, reference, "fp16", quiet, seconds=0.4
    )
    assert session.done == ["build", "check", "measure"]
    assert result.version == VERSION
    sources = {name: type(part) for name, part in found.memory.parts.items()}
    assert sources == {
        "weights": Built,
        "cache": Measured,
        "activations": Built,
        "buffers": Measured,
        "runtime": Measured,
    }
    assert found.memory.weights.value == result.weights_bytes
    assert found.memory.runtime.value == 10**6  # what the device lost beyond what is known
    assert found.memory.activations.value == CONTEXT_BYTES
    assert found.memory.cache.value == 2 * 3 * 2 * 2 * 2 * 48 * 16 * 2
    for figure, expected in ((found.decode, 20.97), (found.prefill, 24)):
        assert isinstance(figure, Measured)
        assert figure.low <= figure.value <= figure.high
        assert figure.value == pytest.approx(expected, rel=0.02)
        assert (figure.unit, figure.device) == ("ms", "Double of a GPU")
    assert set(found.percentiles["decode"]) >= {"p50", "p90", "p99"}
    said = " ".join((*found.notes, *found.conditions.values()))
    assert "cosine 0.99" in said
    assert found.conditions["cuda"].startswith(layer)
    assert found.conditions["cuda"].endswith("driver 12060")


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("scale", [0.0, 1.5])
def test_on_a_double_an_engine_of_other_weights_is_refused_before_it_is_timed(
    device: Device, graphs: dict[str, GraphFiles], reference: Path, tmp_path: Path, scale: float, precision: str
) -> None:
    """One matrix of one layer is enough, in half precision too."""
    weights = weights_of(MODEL)
    altered = weights | {"layers.1.mlp.down": scale * weights["layers.1.mlp.down"]}
    files = write_graphs(decoder_of(MODEL.config), altered, tmp_path / "altered", precision, [PRIMITIVE])
    session = InProcess()
    plan = tmp_path / "model.engine"
    result = measure.build(session, "tensorrt", files.graphs[PRIMITIVE], plan, WORKLOAD, quiet)
    device.launches.clear()
    with pytest.raises(EngineError, match=r"model\.engine computes something else than its graph") as caught:
        measure.on_tensorrt(session, "tensorrt", plan, result, WORKLOAD, RUNTIME_FIGURE, reference, precision, quiet)
    assert caught.value.exit_code == 4
    assert "Do not deploy it" in caught.value.remedy
    assert session.done == ["build", "check"]
    assert len(device.launches) == 3 + 8  # the prompt in three parts, and the steps


def test_on_a_double_logits_that_are_no_numbers_are_refused(
    device: Device, graphs: dict[str, GraphFiles], reference: Path, tmp_path: Path
) -> None:
    """And are told as JSON all the same."""
    shutil.copytree(graphs["fp32"].graphs[PRIMITIVE].parent, tmp_path / "graph")
    for path in (tmp_path / "graph").glob("*.data"):
        path.write_bytes(b"\xff" * path.stat().st_size)
    plan = built(tmp_path / "graph" / PRIMITIVE.filename, tmp_path / "plan")
    request = {"do": "check", "engine": "tensorrt", "files": {"plan": str(plan), "reference": str(reference)}}
    found = InProcess().run(request, 60, quiet)
    assert (found["cosine"], found["error"]) == (0.0, 1e300)
    with pytest.raises(EngineError, match="cosine 0.000000"):
        judge_logits(found, "fp16", "model.engine")


def test_on_a_double_an_engine_of_another_vocabulary_is_of_another_model(
    device: Device, plan: Path, tmp_path: Path
) -> None:
    ids = IDS[None, :4]
    with (
        EngineRunner(plan, 1, 4, "tensorrt") as runner,
        pytest.raises(EngineError, match="a vocabulary of 200, its reference one of 300") as caught,
    ):
        compare_logits(runner, ids, np.ones((2, 300)), quiet)
    assert "another model" in caught.value.remedy


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_tolerance_is_for_cosine_and_error_each(precision: str) -> None:
    cosine, error = PRECISIONS[precision].tolerance
    found = {"cosine": cosine, "error": error, "equal": 0.5, "positions": 4}
    assert "equal at 50 % of 4 positions" in judge_logits(found, precision, "it")
    for worse in (
        {"cosine": cosine - 1e-6},
        {"error": error + 1e-6},
        {"cosine": float("nan")},
        {"error": float("nan")},
    ):
        with pytest.raises(EngineError, match=f"{precision} allows {cosine} and {error}"):
            judge_logits(found | worse, precision, "it")


def test_the_worst_position_counts() -> None:
    """Of three positions the second is off: its cosine, its error, and one likeliest token of three."""
    expected = np.array([[1.0, 2, 4], [3, 4, 0], [0, 0, 5]])
    logits = expected.copy()
    logits[1] = [4, 3, 0]
    runner = Saying(logits)
    found = compare_logits(runner, IDS[None, :6], expected, quiet)
    assert found == {"cosine": pytest.approx(24 / 25), "error": 1 / 4, "equal": pytest.approx(2 / 3), "positions": 3}
    assert runner.asked == [4, 1, 1]


def test_a_reference_is_of_so_many_tokens_as_there_are_and_fit(tmp_path: Path) -> None:
    """The prompt's last logits and those of every further token."""
    logits = np.arange(3.0 * 200).reshape(200, 3)
    for given, capacity, tokens, steps in (
        (100, 10**6, PROMPT + STEPS, STEPS + 1),
        (30, 10**6, 30, STEPS + 1),
        (100, 10, 10, STEPS + 1),
        (5, 10**6, 5, 5),
        (1, 10**6, 1, 1),
    ):
        runner = Saying(logits)
        runner.capacity = capacity
        write_reference(runner, IDS[:given], tmp_path / "reference.npz")
        ids, expected = read_reference(tmp_path / "reference.npz")
        np.testing.assert_array_equal(ids, IDS[None, :tokens])
        np.testing.assert_array_equal(expected, logits[:steps])
        np.testing.assert_array_equal(runner.ids, IDS[:tokens])
        assert runner.asked == [tokens - steps + 1] + [1] * (steps - 1)


def test_a_reference_that_cannot_be_read_says_so(reference: Path, tmp_path: Path) -> None:
    whole = reference.read_bytes()
    np.savez(tmp_path / "other.npz", ids=IDS[None])
    np.savez(tmp_path / "long.npz", ids=IDS[None, :2], logits=np.ones((5, 3)))
    np.savez(tmp_path / "flat.npz", ids=IDS, logits=np.ones((5, 3)))
    with (tmp_path / "one.npy").open("wb") as file:
        np.save(file, IDS)
    contents = [b"", b"no archive", whole[:-40], whole[: len(whole) // 2]]
    contents += [(tmp_path / name).read_bytes() for name in ("other.npz", "long.npz", "flat.npz", "one.npy")]
    for content in contents:
        reference.write_bytes(content)
        with pytest.raises(EngineError, match=r"the reference reference\.npz cannot be read") as caught:
            read_reference(reference)
        assert caught.value.remedy
    with pytest.raises(EngineError, match="cannot be read"):
        read_reference(tmp_path / "none.npz")


def test_on_a_double_weights_stored_twice_are_a_note(
    device: Device, graphs: dict[str, GraphFiles], plan: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "used_memory", lambda: None)
    session = InProcess()
    result = measure.build(session, "tensorrt", graphs["fp32"].graphs[PRIMITIVE], plan, WORKLOAD, quiet)
    result = replace(result, warnings=("something is stored twice",))
    found = measure.on_tensorrt(
        session, "tensorrt", plan, result, WORKLOAD, RUNTIME_FIGURE, reference, "fp32", quiet, seconds=0.4
    )
    assert found.memory.runtime == RUNTIME_FIGURE  # where the device does not say
    assert "something is stored twice" in found.notes


def test_on_a_double_an_engine_of_pictures_is_checked_beyond_their_first_row(device: Device, tmp_path: Path) -> None:
    """It reads one token at a time; positions as if all were one row are found out."""
    decoder, variants = llamagen(), [RUNTIME, PRIMITIVE]
    weights, ids = random_weights(decoder), drawn(decoder).ids[0]
    files = write_graphs(decoder, weights, tmp_path / "graphs", "fp32", variants)
    path = tmp_path / "reference.npz"
    write_reference(ProcessorRunner(files.graphs[RUNTIME], 1, SIDE**2, threads=1), ids, path)
    turned = replace(decoder.rotaries[0], grid=replace(decoder.rotaries[0].grid, side=SIDE**2))
    layers = tuple(replace(layer, attention=replace(layer.attention, rotary=turned)) for layer in decoder.layers)
    other = write_graphs(replace(decoder, layers=layers), weights, tmp_path / "other", "fp32", [PRIMITIVE])
    for graphs, right in ((files, True), (other, False)):
        plan = built(graphs.graphs[PRIMITIVE], tmp_path / f"{right}.plan", Workload(2, 1, SIDE**2))
        with EngineRunner(plan, 1, SIDE**2, "tensorrt") as runner:
            assert runner.most_tokens == 1
            found = compare_logits(runner, *read_reference(path), quiet)
        assert (found["cosine"] > 0.99999) == right


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_of_states_in_codes_the_tolerance_is_wider_and_named(precision: str) -> None:
    agreement = {"cosine": 0.992, "error": 0.08, "equal": 1.0, "positions": 9}
    assert "cosine 0.992" in judge_logits(agreement, precision, "plan", "activations in 8 bits")
    with pytest.raises(WrongEngine, match=f"{precision} with a KV cache in fp8 allows 0.99 and 0.1"):
        judge_logits(agreement | {"error": 0.2}, precision, "plan", "a KV cache in fp8")
    if precision != "bf16":
        with pytest.raises(WrongEngine):
            judge_logits(agreement, precision, "plan")


def test_floats_of_few_bits_have_tolerances_of_their_own() -> None:
    """By the words of the model's coarsest format."""
    decoder, words = uniform(96, 3, (4, 2, 24), 192, 200), {}
    for layers in (("w8a8", "int8"), ("fp8", "w8a8"), ("nvfp4", "fp8")):
        one, other = (WEIGHT_FORMATS[name] for name in layers)
        words[layers[0]] = decoder.with_formats([(one, None), (None, other), (other, one)], None, None).rounded_states
    assert words == {
        "w8a8": "activations in 8 bits",
        "fp8": "activations in floats of 8 bits",
        "nvfp4": "activations in floats of 4 bits",
    }
    for error, passes in ((0.09, "w8a8"), (0.19, "fp8"), (0.49, "nvfp4")):
        agreement = {"cosine": 0.99, "error": error, "equal": 1.0, "positions": 9}
        assert judge_logits(agreement, "fp16", "plan", words[passes])
        for narrower in list(words)[: list(words).index(passes)]:
            with pytest.raises(WrongEngine):
                judge_logits(agreement, "fp16", "plan", words[narrower])


def test_a_reference_says_which_states_were_rounded(reference: Path, tmp_path: Path) -> None:
    assert codes_of(reference) == ""
    write_reference(Saying(np.zeros((80, 5))), IDS[:20], tmp_path / "reference.npz", "a KV cache in int8")
    assert codes_of(tmp_path / "reference.npz") == "a KV cache in int8"


def test_inputs_in_blocks_of_8_bits_have_a_tolerance_of_their_own() -> None:
    """As far as a large input in a block moves the logits, and no further."""
    agreement = {"cosine": 0.96, "error": 0.25, "equal": 1.0, "positions": 9}
    assert "cosine 0.96" in judge_logits(agreement, "fp16", "model.gguf", ROUNDED_INPUTS)
    for worse in ({"cosine": 0.94}, {"error": 0.31}):
        with pytest.raises(WrongEngine, match=ROUNDED_INPUTS):
            judge_logits(agreement | worse, "fp16", "model.gguf", ROUNDED_INPUTS)
    with pytest.raises(WrongEngine):
        judge_logits(agreement, "fp16", "model.gguf")
