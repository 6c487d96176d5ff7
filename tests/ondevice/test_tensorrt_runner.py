"""The GPU path on doubles of TensorRT and of both CUDA modules, which run the real graph in ONNX Runtime.

No test here ran on a GPU. What they show is that the steps, the cache, the addresses, the order of the work and
the memory are right, by the rules that the doubles enforce.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from edgeprune.engine.onnx.graph import GraphFiles, GraphVariant, write_graphs
from edgeprune.errors import EngineError, NumericalError
from edgeprune.ondevice.cuda import Cuda
from edgeprune.ondevice.figures import Workload
from edgeprune.ondevice.sampling import generate
from edgeprune.ondevice.tensorrt_runner import EngineRunner, Timed
from edgeprune.precision import CACHE_FORMATS
from tests.support.doubles.double_device import Device
from tests.support.doubles.double_tensorrt import CONTEXT_BYTES
from tests.support.doubles.install import MODEL, PRIMITIVE, RUNTIME, WORKLOAD, built, install, on_the_processor
from tests.support.reference import decoder_of, weights_of

pytest_plugins = ("tests.support.doubles.fixtures",)

PROMPTS = [[5, 17, 42, 9, 133, 60, 2, 71, 8, 150, 99, 31, 12, 64, 77, 180, 3, 28, 111], [88, 3, 150]]
KINDS = ("input_ids", "position_ids", "attention_mask")


def tokens(runner: object, prompts: list[list[int]], count: int) -> np.ndarray:
    return np.stack(list(generate(runner, prompts, count)), axis=1)


def opened(plan: Path, batch: int = 2, capacity: int = WORKLOAD.context) -> EngineRunner:
    return EngineRunner(plan, batch, capacity, "tensorrt")


def test_on_a_double_greedy_text_is_that_of_onnx_runtime(
    device: Device, graphs: dict[str, GraphFiles], precision: str, tmp_path: Path
) -> None:
    """Left padding in a batch of two, of which one prompt is longer than the engine's longest sequence."""
    files = graphs[precision]
    expected = tokens(on_the_processor(files, 2), PROMPTS, 25)
    assert len(np.unique(expected)) > 5
    with opened(built(files.graphs[PRIMITIVE], tmp_path / "plan")) as runner:
        assert runner.most_tokens == 8 < len(PROMPTS[0])
        np.testing.assert_array_equal(tokens(runner, PROMPTS, 25), expected)
        np.testing.assert_array_equal(tokens(runner, PROMPTS, 25), expected)  # and begins anew


def test_on_a_double_every_step_has_the_logits_of_onnx_runtime(
    device: Device, graphs: dict[str, GraphFiles], precision: str, tmp_path: Path
) -> None:
    """After prompts of one part, of two full parts and of a rest; then token by token to the last place."""
    files = graphs[precision]
    ids = np.random.default_rng(0).integers(0, 200, (2, WORKLOAD.context))
    reference = on_the_processor(files, 2)
    with opened(built(files.graphs[PRIMITIVE], tmp_path / "plan")) as runner:
        for prompt in (5, 16, 19):
            runner.reset()
            reference.reset()
            ends = [prompt, *range(prompt + 1, WORKLOAD.context + 1)]
            for begin, end in zip([0, *ends], ends, strict=False):
                found, wanted = (one.run(ids[:, begin:end]) for one in (runner, reference))
                np.testing.assert_allclose(found, wanted, atol=2e-4 if precision == "fp32" else 0.05)
                assert runner.past == end


def test_on_a_double_a_cache_in_int8_moves_codes(device: Device, precision: str, tmp_path: Path) -> None:
    """The logits of ONNX Runtime's operator over the same codes; the cache is a half or a quarter of one of floats."""
    decoder, weights = decoder_of(MODEL.config), dict(weights_of(MODEL))
    quantised = decoder.with_cache(CACHE_FORMATS["int8"])
    for name in set(quantised.shapes()) - set(decoder.shapes()):
        weights[name] = torch.full(quantised.shapes()[name], 0.02)
    opset23 = GraphVariant("opset23", "last")
    files = write_graphs(quantised, weights, tmp_path / "codes", precision, [opset23])
    reference = write_graphs(quantised, weights, tmp_path / "reference", "fp32", [RUNTIME])
    ids = np.random.default_rng(0).integers(0, 200, (2, 24))
    expected = on_the_processor(reference, 2)
    with opened(built(files.graphs[opset23], tmp_path / "plan")) as runner:
        in_codes = runner.cache_bytes
        for begin, end in ((0, 16), (16, 19), *((place, place + 1) for place in range(19, 24))):
            found, wanted = (one.run(ids[:, begin:end]) for one in (runner, expected))
            np.testing.assert_allclose(found, wanted, atol=1e-3 if precision == "fp32" else 0.4)
    floats = write_graphs(decoder, weights, tmp_path / "floats", precision, [opset23])
    with opened(built(floats.graphs[opset23], tmp_path / "other")) as runner:
        assert runner.cache_bytes == (4 if precision == "fp32" else 2) * in_codes


def test_on_a_double_positions_count_the_real_tokens_from_zero(device: Device, plan: Path) -> None:
    """Rotary embeddings turn by differences: positions that are all off by one would give the same logits."""
    with opened(plan) as runner:
        tokens(runner, [PROMPTS[0][:11], [88, 3, 150]], 3)
    steps = device.read_by_steps
    assert [step["input_ids"].shape[1] for step in steps] == [8, 3, 1, 1]
    ids, positions = (np.concatenate([step[name] for step in steps], axis=1) for name in KINDS[:2])
    np.testing.assert_array_equal(ids[0, :11], PROMPTS[0][:11])
    np.testing.assert_array_equal(ids[1, :11], [0] * 8 + [88, 3, 150])
    np.testing.assert_array_equal(positions, [list(range(13)), [0] * 8 + list(range(5))])
    for step, total in zip(steps, (8, 11, 12, 13), strict=True):
        np.testing.assert_array_equal(step["attention_mask"], np.array([[1] * 13, [0] * 8 + [1] * 5])[:, :total])


@pytest.mark.parametrize("per_thread", [False, True])
def test_on_a_double_nothing_rests_on_the_default_stream(
    per_thread: bool, graphs: dict[str, GraphFiles], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also where copies wait for no stream, as cuda-python is told by an environment variable."""
    install(monkeypatch, Device(per_thread=per_thread), ("cuda-python",))
    with opened(built(graphs["fp32"].graphs[PRIMITIVE], tmp_path / "plan")) as runner:
        expected = tokens(on_the_processor(graphs["fp32"], 2), PROMPTS, 12)
        np.testing.assert_array_equal(tokens(runner, PROMPTS, 12), expected)


def test_on_a_double_a_step_copies_its_inputs_and_logits_and_nothing_else(device: Device, plan: Path) -> None:
    """The cache stays where it is: the addresses of past and present are exchanged."""
    with opened(plan) as runner:
        runner.run(np.ones((2, 8), np.int64))
        for step in range(3):
            device.copies.clear()
            runner.run(np.ones((2, 1), np.int64))
            bound = device.bound[-1]
            assert device.copies == [
                ("host to device", bound["input_ids"], 2 * 8),
                ("host to device", bound["position_ids"], 2 * 8),
                ("host to device", bound["attention_mask"], 2 * (9 + step) * 8),
                ("device to host", bound["logits"], 2 * 200 * 4),
            ]
        caches = [name for name in device.bound[0] if name.startswith("past")]
        assert len(caches) == 6
        for before, after in zip(device.bound, device.bound[1:], strict=False):
            for past in caches:
                present = past.replace("past_key_values", "present")
                assert (before[past], before[present]) == (after[present], after[past])
            assert all(before[name] == after[name] for name in (*KINDS, "logits"))


def test_on_a_double_the_room_is_the_engine_s_and_every_place_of_it_is_used(device: Device, plan: Path) -> None:
    with opened(plan, batch=1, capacity=10**6) as runner:
        assert runner.capacity == WORKLOAD.context
        runner.run(np.ones((1, 47), np.int64))
        runner.run(np.ones((1, 1), np.int64))
        with pytest.raises(EngineError, match="49 tokens do not fit into the cache of 48"):
            runner.run(np.ones((1, 1), np.int64))
    with opened(plan, batch=1, capacity=10) as runner:
        runner.run(np.ones((1, 10), np.int64))
        with pytest.raises(EngineError, match="11 tokens"):
            runner.run(np.ones((1, 1), np.int64))


def test_on_a_double_memory_is_counted_as_it_is_held_and_all_given_back(device: Device, plan: Path) -> None:
    with opened(plan) as runner:
        assert runner.memory_bytes == CONTEXT_BYTES
        cache = 3 * 2 * 2 * 2 * WORKLOAD.context * 16 * 4  # layers, key and value, batch, heads
        assert runner.cache_bytes == 2 * cache
        assert runner.buffer_bytes == 8 * 2 * (8 + 8 + 48) + 2 * 200 * 4
        weights = json.loads(plan.read_bytes().split(b"\n", 2)[1])["weights"]
        assert device.used == runner.cache_bytes + runner.buffer_bytes + weights + CONTEXT_BYTES
    assert device.used == 0
    runner.close()  # once more does no harm


def test_on_a_double_a_full_memory_says_so_wherever_it_ends(device: Device, plan: Path) -> None:
    """At the engine, its context, a buffer or the cache; what was allocated is given back."""
    with opened(plan):
        needed = device.used
    said = set()
    for memory in range(2**18, needed, 2**17):
        device.memory = memory
        with pytest.raises(EngineError) as caught:
            opened(plan)
        assert "take a smaller --batch or --context" in caught.value.remedy
        said.add(caught.value.message[:12])
        assert device.used == 0
    assert said == {"model.engine", "no memory fo", "the GPU has "}
    device.memory = needed
    opened(plan).close()


def test_on_a_double_an_engine_of_another_release_or_gpu(
    device: Device, layer: str, plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, device, (layer,), version="10.3.0")
    with pytest.raises(EngineError, match=r"by tensorrt 10\.3\.0 on Double of a GPU: .*Version tag") as caught:
        opened(plan)
    assert "build it here" in caught.value.remedy
    assert caught.value.exit_code == 4
    install(monkeypatch, device, (layer,))
    device.sm = 86
    with pytest.raises(EngineError, match="incompatible device, expecting compute 8.6 got compute 8.7"):
        opened(plan)
    assert device.used == 0


def test_on_a_double_a_file_that_is_no_engine(device: Device, tmp_path: Path) -> None:
    (tmp_path / "broken.engine").write_bytes(b"no engine")
    with pytest.raises(EngineError, match=r"broken\.engine cannot be loaded.*Magic tag"):
        opened(tmp_path / "broken.engine")
    with pytest.raises(EngineError, match=r"none\.engine cannot be read: No such file"):
        opened(tmp_path / "none.engine")


def test_on_a_double_more_sequences_than_the_engine_takes(device: Device, plan: Path) -> None:
    with pytest.raises(EngineError, match="takes 2 sequences at once, not 3") as caught:
        opened(plan, batch=3)
    assert "--batch" in caught.value.remedy
    assert device.used == 0  # though the error's traceback still holds the frames


def test_on_a_double_a_shape_that_the_engine_does_not_take(device: Device, plan: Path) -> None:
    with opened(plan) as runner, pytest.raises(EngineError, match="does not take input_ids of 2x9") as caught:
        Timed(runner, Workload(2, 9, 48)).prepare_prefill()
    assert "Build it again" in caught.value.remedy


def test_on_a_double_a_refused_step_is_an_error(device: Device, plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(plan) as runner:
        monkeypatch.setattr(Cuda, "stream", 12345)
        with pytest.raises(EngineError, match="TensorRT refuses a step: .*0x3039 is no stream"):
            runner.run(np.ones((2, 1), np.int64))


def test_on_a_double_a_tensor_that_the_engine_misses(device: Device, plan: Path) -> None:
    plan.write_bytes(plan.read_bytes().replace(b'"present.1.key"', b'"presents.1.key"'))
    with pytest.raises(EngineError, match=r"the engine has no tensor present\.1\.key: .*is no input or output"):
        opened(plan)


def test_on_a_double_a_step_that_fails_on_the_gpu_is_an_error(
    layer: str, graphs: dict[str, GraphFiles], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Told by whoever waits for it first; what fails afterwards does not hide it."""
    device = Device()
    install(monkeypatch, device, (layer,))
    plan = built(graphs["fp32"].graphs[PRIMITIVE], tmp_path / "plan")
    with pytest.raises(EngineError, match="the GPU failed: "), opened(plan) as runner:
        runner.run(np.full((2, 1), 10**6))
    assert "the context ends before its work" not in device.faults


def test_on_a_double_work_is_awaited_before_the_engine_goes(device: Device, plan: Path) -> None:
    with opened(plan) as runner:
        runner.stage(
            np.ones((2, 1), np.int64), np.zeros((2, 1), np.int64), np.ones((2, 1), np.int64), np.zeros(2, np.int64)
        )
        runner.step()
    assert device.faults == []


def test_on_a_double_logits_that_are_no_numbers_end_the_text(device: Device, layer: str, tmp_path: Path) -> None:
    from tests.support.graph_models import write

    files = write(MODEL, tmp_path)
    for path in files.data:
        path.write_bytes(b"\xff" * path.stat().st_size)
    with (
        opened(built(files.graphs[PRIMITIVE], tmp_path / "plan")) as runner,
        pytest.raises(NumericalError, match="step 1"),
    ):
        tokens(runner, PROMPTS, 2)


def test_on_a_double_times_are_those_of_the_gpu_s_clock(device: Device, plan: Path) -> None:
    with opened(plan) as runner:
        timed = Timed(runner, WORKLOAD)
        timed.prepare_decode()
        assert timed.decode() == pytest.approx(20 + 0.5 + 0.01 * 47, rel=0.02)
        assert timed.note == ""
        timed.prepare_prefill()
        assert timed.prefill() == pytest.approx(20 + 0.5 * 8, rel=0.02)
    assert set(device.launches) == {"step"}


def test_on_a_double_a_launch_bound_decode_is_replayed_where_it_can_be(device: Device, layer: str, plan: Path) -> None:
    """A replay is timed with cuda-python, pycuda has none; what was captured at decode is no prefill."""
    device.launch_ms = 30
    with opened(plan) as runner:
        timed = Timed(runner, WORKLOAD)
        timed.prepare_decode()
        device.launches.clear()
        assert timed.decode() == pytest.approx(20.97, rel=0.02)
        assert device.launches == ["replay" if layer == "cuda-python" else "step"]
        assert "launching a decode step takes 30.00 ms of its 2" in timed.note
        end = {"cuda-python": "measured as the replay of a captured CUDA graph", "pycuda": "cannot replay it"}[layer]
        assert end in timed.note
        timed.prepare_prefill()
        device.launches.clear()
        assert timed.prefill() == pytest.approx(24, rel=0.02)
        timed.decode()  # not prepared: no replay of what was captured with other shapes
        assert device.launches == ["step", "step"]


def test_on_a_double_the_replay_computes_the_step_again(
    graphs: dict[str, GraphFiles], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    device = Device()
    install(monkeypatch, device, ("cuda-python",))
    with opened(built(graphs["fp32"].graphs[PRIMITIVE], tmp_path / "plan")) as runner:
        ids, one = np.full((2, 1), 7), np.ones((2, 1), np.int64)
        runner.stage(ids, 0 * one, one, np.zeros(2, np.int64))
        runner.step()
        replay = runner.cuda.capture(runner.step)
        logits = runner._address["logits"]
        first, second = np.empty((2, 1, 200), np.float32), np.empty((2, 1, 200), np.float32)
        runner.cuda.download(first, logits)
        runner.cuda.upload(logits, 0 * first)
        replay()
        runner.cuda.download(second, logits)
        np.testing.assert_array_equal(first, second)
        assert np.abs(first).max() > 0
    assert device.faults == []


def test_on_a_double_an_engine_that_cannot_be_captured_is_timed_without(
    graphs: dict[str, GraphFiles], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    device = Device()
    device.launch_ms, device.capturable = 30, False
    install(monkeypatch, device, ("cuda-python",))
    with opened(built(graphs["fp32"].graphs[PRIMITIVE], tmp_path / "plan")) as runner:
        timed = Timed(runner, WORKLOAD)
        timed.prepare_decode()
        assert "cannot be captured" in timed.note
        assert timed.decode() == pytest.approx(20.97, rel=0.02)
    assert device.faults == []
