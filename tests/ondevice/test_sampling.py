"""Greedy text equals transformers' own; samples follow the distribution that was asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.engine.onnx.graph import GraphVariant, write_graphs
from edgeprune.errors import InputError, NumericalError
from edgeprune.ondevice.onnxruntime import GraphRunner
from edgeprune.ondevice.sampling import check_sampling, choose, generate
from tests.support.graph_models import llama
from tests.support.reference import decoder_of, weights_of

MODEL = llama(True)
VARIANT = GraphVariant("onnxruntime", "last")
PROMPTS = [[5, 17, 42, 9, 133, 60, 2], [88, 3, 150]]


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graph")
    return write_graphs(decoder_of(MODEL.config), weights_of(MODEL), folder, "fp32", [VARIANT]).graphs[VARIANT]


def drawn(graph: Path, prompts: list[list[int]], count: int, capacity: int = 64, **options: object) -> np.ndarray:
    """New tokens (prompts, steps)."""
    return np.stack(list(generate(GraphRunner(graph, len(prompts), capacity), prompts, count, **options)), axis=1)


@torch.inference_mode()
def reference(prompts: list[list[int]], count: int, end_id: int | None = None) -> np.ndarray:
    """What transformers' own generate adds to prompts padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    found = MODEL.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=end_id,
        pad_token_id=0 if end_id is None else end_id,
    )
    return found[:, longest:].numpy()


def test_greedy_equals_transformers(graph: Path) -> None:
    """Two prompts of different lengths in one batch, and each alone."""
    expected = reference(PROMPTS, 40)
    assert len(np.unique(expected)) > 10  # no repetition of one token
    np.testing.assert_array_equal(drawn(graph, PROMPTS, 40), expected)
    for row, prompt in enumerate(PROMPTS):
        np.testing.assert_array_equal(drawn(graph, [prompt], 40)[0], expected[row])


def test_an_ended_row_repeats_its_end_until_all_have(graph: Path) -> None:
    free = reference(PROMPTS, 40)
    only_first = [token for token in free[0, 3:30] if token not in free[1]]
    end = int(only_first[0])
    found = drawn(graph, PROMPTS, 40, end_ids={end})
    np.testing.assert_array_equal(found, reference(PROMPTS, 40, end))
    assert found.shape == (2, 40)
    alone = drawn(graph, PROMPTS[:1], 40, end_ids={end})
    assert alone.shape[1] == 1 + list(free[0]).index(end)
    assert alone[0, -1] == end


def test_tokens_come_one_step_at_a_time(graph: Path) -> None:
    runner = GraphRunner(graph, 1, 64)
    steps = generate(runner, [[1, 2, 3]], 5)
    next(steps)
    assert runner.past == 3
    next(steps)
    assert runner.past == 4


def test_equal_seeds_draw_equal_tokens(graph: Path) -> None:
    runs = [drawn(graph, PROMPTS, 20, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert (runs[0] != runs[2]).any()


def test_a_runner_starts_anew(graph: Path) -> None:
    runner = GraphRunner(graph, 1, 64)
    first, second = (np.stack(list(generate(runner, [PROMPTS[0]], 10))) for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_the_last_place_of_the_context_is_used(graph: Path) -> None:
    """The last token needs no place in the cache: a capacity of 9 takes 7 tokens and gives 3."""
    np.testing.assert_array_equal(drawn(graph, PROMPTS[:1], 3, capacity=9), reference(PROMPTS[:1], 3))
    with pytest.raises(InputError, match="7 tokens and 4 new ones exceed the context of 9") as caught:
        drawn(graph, PROMPTS[:1], 4, capacity=9)
    assert "--max-new-tokens 3" in caught.value.remedy
    with pytest.raises(InputError, match="context of 5") as caught:
        drawn(graph, PROMPTS[:1], 1, capacity=5)
    assert "Shorten the prompt by 2 tokens" in caught.value.remedy


def test_an_empty_prompt_is_refused(graph: Path) -> None:
    with pytest.raises(InputError, match="empty"):
        drawn(graph, [[1], []], 1)


def test_logits_that_are_no_numbers_are_refused(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GraphRunner, "run", lambda *_: np.array([[0.0, np.nan]]))
    with pytest.raises(NumericalError, match="step 1"):
        drawn(graph, [[1]], 1)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (1.0, 0.7)])
def test_samples_follow_the_distribution(temperature: float, top_p: float) -> None:
    """Chi-square of 100000 draws of 6 tokens at the 0.1 % level, against the textbook's formula.

    They are 20 seeds' draws together: one seed alone can be an unlucky one, whose uniform numbers fail by themselves.
    """
    stats = pytest.importorskip("scipy.stats")
    logits = np.log([0.05, 0.3, 0.2, 0.25, 0.15, 0.05])
    expected = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    if top_p < 1:
        expected = np.array([0, 0.3, 0.2, 0.25, 0, 0]) / 0.75  # 0.30, 0.55, 0.75 >= 0.7: three tokens
    rows, kept = np.tile(logits, (5_000, 1)), expected > 0
    draws = [choose(rows, temperature, top_p, np.random.default_rng(seed).random(len(rows))) for seed in range(20)]
    counts = np.bincount(np.concatenate(draws), minlength=6)
    assert counts[~kept].sum() == 0
    assert stats.chisquare(counts[kept], counts.sum() * expected[kept]).pvalue > 1e-3


def test_top_p_keeps_the_token_that_crosses_it() -> None:
    """Of halves, quarters and eighths: below one half the likeliest alone, then one more at each border."""
    rows = np.tile(np.log([0.125, 0.5, 0.25, 0.125]), (500, 1))
    for top_p, kept in ((0.0, {1}), (0.49, {1}), (0.51, {1, 2}), (0.74, {1, 2}), (0.76, {0, 1, 2}), (1, {0, 1, 2, 3})):
        assert set(choose(rows, 1.0, top_p, np.random.default_rng(0).random(len(rows))).tolist()) == kept


def test_a_tiny_temperature_is_greedy() -> None:
    logits = np.random.default_rng(0).normal(size=(50, 30))
    for temperature in (1e-6, 1e-300, 5e-324):
        points = np.random.default_rng(0).random(50)
        np.testing.assert_array_equal(choose(logits, temperature, 1.0, points), logits.argmax(axis=1))


def test_a_share_of_nothing_takes_the_likeliest_however_little_that_is() -> None:
    logits = np.zeros((1, 4096))
    logits[0, 70] = 0.1
    assert choose(logits, 1.0, 0.0, np.array([0.5])).tolist() == [70]


@pytest.mark.parametrize("spread", [6.0, 3.0, 1.0])  # of the likeliest hundreds, thousands, and nearly all tokens
def test_a_large_vocabulary_is_drawn_from_as_if_all_of_it_were_sorted(spread: float) -> None:
    generator = np.random.default_rng(0)
    logits = spread * generator.standard_normal((6, 30_000))
    points = generator.random(6)
    for row, point, drawn in zip(logits, points, choose(logits, 1.0, 0.95, points), strict=True):
        order = np.argsort(-row, kind="stable")
        shares = np.exp(row[order]) / np.exp(row).sum()
        kept = int(np.searchsorted(shares.cumsum(), 0.95)) + 1
        place = np.searchsorted(shares[:kept].cumsum(), point * shares[:kept].sum(), side="right")
        assert drawn == order[place]


@given(st.integers(0, 10_000), st.floats(0.01, 1.0), st.floats(0.05, 20.0), st.integers(1, 40))
@settings(deadline=None, max_examples=200)
def test_no_draw_leaves_the_nucleus(seed: int, top_p: float, temperature: float, vocabulary: int) -> None:
    """All that is strictly likelier than the drawn token weighs less than top_p together."""
    logits = np.random.default_rng(seed).normal(0, 3, (4, vocabulary))
    probabilities = np.exp(logits / temperature)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    drawn, last = np.random.default_rng(seed).random(len(logits)), np.full(len(logits), np.nextafter(1.0, 0.0))
    for points in (drawn, last):
        picks = choose(logits, temperature, top_p, points)
        for row, pick in zip(probabilities, picks, strict=True):
            assert row[row > row[pick]].sum() < top_p + 1e-12


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((float("inf"), 0, 1.0), "--temperature inf"),
        ((float("nan"), 0, 1.0), "--temperature nan"),
        ((-1.0, 0, 1.0), "--temperature -1"),
        ((1.0, -1, 1.0), "--top-k -1"),
        ((1.0, 0, float("nan")), "--top-p nan"),
        ((1.0, 0, 1.5), "--top-p 1.5"),
    ],
)
def test_a_sampling_that_draws_nothing_is_refused(given: tuple, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_sampling(*given)
    check_sampling(0.0, 0, 1.0)
