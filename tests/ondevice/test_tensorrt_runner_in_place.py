"""The runner of engines that update their KV cache in place, on doubles that refuse what the real runtime would.

No test here ran on a GPU: see test_tensorrt_runner.py.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest

from edgeprune.engine.onnx.graph import GraphFiles, GraphVariant, write_graphs
from edgeprune.errors import EngineError
from edgeprune.ondevice.figures import Workload
from edgeprune.ondevice.reference import compare_logits, read_reference
from edgeprune.ondevice.sampling import Drawing, generate
from edgeprune.ondevice.serving import Job, Runners, Service, Token
from edgeprune.ondevice.tensorrt_runner import EngineRunner, Timed
from edgeprune.ondevice.worker import quiet
from tests.support.doubles.double_device import Device
from tests.support.doubles.double_tensorrt import CONTEXT_BYTES, ICudaEngineInPlace
from tests.support.doubles.install import IN_PLACE_VERSION, MODEL, OPSET24, WORKLOAD, built, install, on_the_processor
from tests.support.reference import decoder_of, weights_of

pytest_plugins = ("tests.support.doubles.fixtures",)

PROMPTS = [[5, 17, 42, 9, 133, 60, 2, 71, 8, 150, 99, 31, 12, 64, 77, 180, 3, 28, 111], [88, 3, 150]]
CACHE = 3 * 2 * 2 * 2 * WORKLOAD.context * 16 * 4  # layers, key and value, batch, heads, slots, head_dim, bytes


def opened(plan: Path, batch: int = 2, capacity: int = WORKLOAD.context) -> EngineRunner:
    return EngineRunner(plan, batch, capacity, "tensorrt")


def test_on_a_double_greedy_text_is_that_of_onnx_runtime(
    device: Device,
    layer: str,
    graphs: dict[str, GraphFiles],
    precision: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Left padding in a batch of two; a prompt in parts; a second text over what the first one left in the cache."""
    install(monkeypatch, device, (layer,), IN_PLACE_VERSION)
    files = graphs[precision]
    expected = [
        np.stack(list(generate(on_the_processor(files, 2), prompts, 25)), axis=1)
        for prompts in (PROMPTS, PROMPTS[::-1])
    ]
    with opened(built(files.graphs[OPSET24], tmp_path / "plan")) as runner:
        assert runner.in_place
        for prompts, wanted in zip((PROMPTS, PROMPTS[::-1]), expected, strict=True):
            np.testing.assert_array_equal(np.stack(list(generate(runner, prompts, 25)), axis=1), wanted)


def test_on_a_double_every_step_has_the_logits_of_onnx_runtime(
    device: Device, graphs: dict[str, GraphFiles], plan_in_place: Path
) -> None:
    """To the last slot, which is written too; one more is refused before it reaches the engine."""
    ids = np.random.default_rng(0).integers(0, 200, (2, WORKLOAD.context + 1))
    reference = on_the_processor(graphs["fp32"], 2)
    with opened(plan_in_place) as runner:
        for prompt in (5, 19):
            runner.reset()
            reference.reset()
            ends = [prompt, *range(prompt + 1, WORKLOAD.context + 1)]
            for begin, end in zip([0, *ends], ends, strict=False):
                found, wanted = (one.run(ids[:, begin:end]) for one in (runner, reference))
                np.testing.assert_allclose(found, wanted, atol=2e-4)
        with pytest.raises(EngineError, match="49 tokens do not fit into the cache of 48"):
            runner.run(ids[:, -1:])


def test_on_a_double_one_buffer_is_bound_as_past_and_present(device: Device, plan_in_place: Path) -> None:
    """Of every layer, at every step: nothing but a step's inputs and its logits is copied."""
    with opened(plan_in_place) as runner:
        runner.run(np.ones((2, 8), np.int64))
        device.copies.clear()
        runner.run(np.ones((2, 1), np.int64))
        bound = device.bound[-1]
        assert [(kind, size) for kind, _, size in device.copies] == [
            ("host to device", 2 * 8),  # input_ids
            ("host to device", 2 * 8),  # position_ids
            ("host to device", 2 * 8 * WORKLOAD.context),  # attention_mask
            ("host to device", 2 * 8),  # write_indices
            ("device to host", 2 * 200 * 4),
        ]
        caches = [name for name in bound if name.startswith("past")]
        assert len(caches) == len({bound[name] for name in caches}) == 6
        assert all(bound[name] == bound[name.replace("past_key_values", "present")] for name in caches)
        assert device.bound[0] == bound  # no address changes from step to step
        assert [step["write_indices"].tolist() for step in device.read_by_steps] == [[0, 0], [8, 8]]
        assert {step["attention_mask"].shape for step in device.read_by_steps} == {(2, WORKLOAD.context)}


def test_on_a_double_rows_of_different_lengths_step_together(
    device: Device, graphs: dict[str, GraphFiles], plan_in_place: Path
) -> None:
    """Each row is read alone, into its own memory; then all step at once, a row that is idle too."""
    rng = np.random.default_rng(0)
    rows, reference = [rng.integers(0, 200, length) for length in (9, 31)], on_the_processor(graphs["fp32"], 1)
    with opened(plan_in_place) as runner:
        assert runner.has_rows
        for place, row in enumerate(rows):
            runner.row(place).run(row[None, :-2])
        found = [
            runner.advance(np.array([row[n - 2] for row in rows]), np.array([len(row) + n - 2 for row in rows]))
            for n in range(2)
        ]
        idle = runner.advance(np.array([0, rows[1][-1]]), np.array([len(rows[0]), len(rows[1]) - 1]))
        again = runner.row(0)
        again.reset(len(rows[0]) - 1)
        last = again.run(rows[0][None, -1:])
        with pytest.raises(EngineError, match="49 tokens do not fit"):
            runner.advance(np.zeros(2, np.int64), np.array([3, WORKLOAD.context]))
    for place, row in enumerate(rows):
        reference.reset()
        reference.run(row[None, :-2])
        for n in range(2):
            np.testing.assert_allclose(found[n][place], reference.run(row[None, n - 2 :][:, :1])[0], atol=2e-4)
    np.testing.assert_allclose(idle[1], found[1][1], atol=2e-4)
    np.testing.assert_allclose(last[0], found[1][0], atol=2e-4)


def test_on_a_double_a_service_answers_as_many_at_once_as_the_engine_takes(
    device: Device, graphs: dict[str, GraphFiles], plan_in_place: Path
) -> None:
    """The texts are those of ONNX Runtime, and nothing is left on the GPU."""
    prompts = [*PROMPTS, [7, 7, 90]]
    ended, answers = [threading.Event() for _ in prompts], [[] for _ in prompts]

    def job(place: int) -> Job:
        def on_token(token: Token) -> bool:
            answers[place].append(token.id)
            return True

        return Job(prompts[place], 20, Drawing(), frozenset(), on_token, lambda how: ended[place].set())

    with Service(lambda: Runners.of_rows(opened(plan_in_place)), len(prompts)) as service:
        assert len(service.slots) == 2
        for place in range(len(prompts)):
            service.submit(job(place))
        assert all(event.wait(60) for event in ended)
    reference = on_the_processor(graphs["fp32"], 1)
    assert answers == [[int(one[0]) for one in generate(reference, [prompt], 20)] for prompt in prompts]
    assert device.used == 0
    assert max(step["input_ids"].shape[0] for step in device.read_by_steps) == 2


def test_on_a_double_memory_is_that_of_one_cache(device: Device, plan_in_place: Path) -> None:
    with opened(plan_in_place) as runner:
        assert runner.cache_bytes == CACHE
        assert runner.buffer_bytes == 8 * 2 * (8 + 8 + WORKLOAD.context + 1) + 2 * 200 * 4
        weights = json.loads(plan_in_place.read_bytes().split(b"\n", 2)[1])["weights"]
        assert device.used == runner.cache_bytes + runner.buffer_bytes + weights + CONTEXT_BYTES
    assert device.used == 0


def test_on_a_double_a_check_of_few_tokens_takes_the_whole_buffer(
    device: Device, plan_in_place: Path, reference: Path
) -> None:
    """The capacity is the engine's, however short the text; the reference is met to its last step."""
    ids, logits = read_reference(reference)
    with opened(plan_in_place, batch=1, capacity=ids.shape[1]) as runner:
        assert (runner.capacity, runner.cache_bytes) == (28, CACHE // 2)
        agreement = compare_logits(runner, ids, logits, quiet)
    assert agreement["cosine"] > 0.99999
    assert agreement["equal"] == 1


def test_on_a_double_an_engine_that_does_not_alias_its_cache_is_refused(
    device: Device, plan_in_place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ICudaEngineInPlace, "get_aliased_input_tensor", lambda *_: None)
    with pytest.raises(EngineError, match=r"writes present\.0\.key over no input, not over past_key_values\.0\.key"):
        opened(plan_in_place)
    assert device.used == 0


def test_on_a_double_a_binding_without_the_call_is_taken_at_its_word(
    device: Device, plan_in_place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(ICudaEngineInPlace, "get_aliased_input_tensor")
    with opened(plan_in_place) as runner:
        assert runner.run(np.ones((2, 3), np.int64)).shape == (2, 200)


def test_on_a_double_a_write_beyond_the_cache_fails(
    layer: str, graphs: dict[str, GraphFiles], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What the runner's own check does not see, the double does."""
    install(monkeypatch, Device(), (layer,), IN_PLACE_VERSION)
    plan = built(graphs["fp32"].graphs[OPSET24], tmp_path / "plan")
    with pytest.raises(EngineError, match="the GPU failed"), opened(plan) as runner:
        ones = np.ones((2, 1), np.int64)
        runner.stage(ones, ones, np.ones((2, WORKLOAD.context), np.int64), np.full(2, WORKLOAD.context))
        runner.step()
        runner.cuda.synchronize()


def test_on_a_double_times_are_those_of_the_last_slot_and_a_replay_computes_the_same(
    layer: str, device: Device, plan_in_place: Path
) -> None:
    device.launch_ms = 30
    with opened(plan_in_place) as runner:
        timed = Timed(runner, WORKLOAD)
        timed.prepare_decode()
        assert timed.decode() == pytest.approx(20 + 0.5 + 0.01 * 47, rel=0.02)
        assert device.launches[-1] == ("replay" if layer == "cuda-python" else "step")
        runner.cuda.synchronize()
        assert device.read_by_steps[-1]["write_indices"].tolist() == [47, 47]
        timed.prepare_prefill()
        timed.prefill()
        assert device.read_by_steps[-1]["write_indices"].tolist() == [0, 0]


def test_on_a_double_an_engine_is_built_for_one_context(
    device: Device, layer: str, graphs: dict[str, GraphFiles], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install(monkeypatch, device, (layer,), IN_PLACE_VERSION)
    with pytest.raises(EngineError, match="room for 48 tokens, not for a context of 64") as caught:
        built(graphs["fp32"].graphs[OPSET24], tmp_path / "plan", Workload(1, 8, 64))
    assert "--context" in caught.value.remedy


def test_on_a_double_an_older_release_names_the_operator_and_the_way_out(
    device: Device, graphs: dict[str, GraphFiles], tmp_path: Path
) -> None:
    with pytest.raises(EngineError, match=r"at node layers\.0\.attention\.keys \(TensorScatter\)") as caught:
        built(graphs["fp32"].graphs[OPSET24], tmp_path / "plan")
    assert "before 10.15" in caught.value.remedy
    assert "--tensorrt" in caught.value.remedy


def test_on_a_double_bf16_is_updated_in_place_too(
    device: Device, layer: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install(monkeypatch, device, (layer,), IN_PLACE_VERSION)
    variants = [OPSET24, GraphVariant("onnxruntime", "last")]
    files = write_graphs(decoder_of(MODEL.config), weights_of(MODEL), tmp_path, "bf16", variants, WORKLOAD.context)
    reference = on_the_processor(files, 2)
    with opened(built(files.graphs[OPSET24], tmp_path / "plan")) as runner:
        for tokens in (5, 1, 1):
            found, wanted = (one.run(np.full((2, tokens), 7)) for one in (runner, reference))
            assert np.abs(found - wanted).max() < 0.1 * np.abs(wanted).max()
    assert runner.vocab_size == 200
