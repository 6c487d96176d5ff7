"""Speculative decoding on graphs of small random models: what is drawn is what the target alone draws."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from edgeprune.engine.onnx.graph import GraphVariant, write_graphs
from edgeprune.errors import InputError
from edgeprune.ondevice.answering import metrics
from edgeprune.ondevice.onnxruntime import GraphRunner
from edgeprune.ondevice.sampling import Drawing, draw, generate
from edgeprune.ondevice.serving import Job, Runners, Service, Token
from edgeprune.ondevice.speculation import SpeculativeRunner
from edgeprune.search.drafts import accepted_runs
from tests.support.graph_models import llama
from tests.support.reference import decoder_of, weights_of

CONTEXT, NEW = 96, 40
ALL = GraphVariant("onnxruntime", "all")
DRAWINGS = [Drawing(), Drawing(0.8, 0.9, 40, 3), Drawing(1.5, 1.0, 0, 4)]
PROMPTS = [np.random.default_rng(length).integers(1, 257, length).tolist() for length in (1, 7, 30)]


def written(folder: Path, noise: float, **changes: int) -> Path:
    """The graph of the target, or of a draft whose weights are as far from it."""
    model = llama(True, **{"vocab_size": 257, "max_position_embeddings": CONTEXT} | changes)
    generator = np.random.default_rng(0)
    weights = {
        name: weight + noise * float(weight.std()) * weight.new_tensor(generator.standard_normal(weight.shape))
        if weight.ndim == 2
        else weight
        for name, weight in weights_of(model).items()
    }
    return write_graphs(decoder_of(model.config), weights, folder, "fp32", [ALL]).graphs[ALL]


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    noises = {"itself": 0.0, "near": 0.1, "far": 3.0}
    return {name: written(tmp_path_factory.mktemp(name), noise) for name, noise in noises.items()}


def speculative(graphs: dict[str, Path], draft: str, count: int, capacity: int = CONTEXT) -> SpeculativeRunner:
    target, small = (GraphRunner(graphs[name], 1, capacity) for name in ("itself", draft))
    return SpeculativeRunner(target, small, count)


def answer(runner: GraphRunner | SpeculativeRunner, prompt: list[int], drawing: Drawing, new: int = NEW) -> list[int]:
    steps = generate(runner, [prompt], new, drawing.temperature, drawing.top_p, drawing.seed, (), drawing.top_k)
    return [int(tokens[0]) for tokens in steps]


@pytest.mark.parametrize("draft", ["itself", "near", "far"])
@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("drawing", DRAWINGS, ids=["greedy", "top p", "all"])
def test_what_is_drawn_is_what_the_target_alone_draws(graphs, draft, count, drawing):
    """Greedy and drawn, one runner for several prompts."""
    alone, runner = GraphRunner(graphs["itself"], 1, CONTEXT), speculative(graphs, draft, count)
    for prompt in PROMPTS:
        assert answer(runner, prompt, drawing) == answer(alone, prompt, drawing)


def test_a_draft_that_is_the_target_is_always_right(graphs):
    runner = speculative(graphs, "itself", 3)
    answer(runner, PROMPTS[1], DRAWINGS[1], 4 * 10 + 1)
    assert (runner.guessed, runner.accepted) == (30, 30)


@pytest.mark.parametrize("drawing", DRAWINGS, ids=["greedy", "top p", "all"])
def test_the_guesses_that_are_accepted_are_those_that_the_matches_tell(graphs, drawing):
    """So that the speed of a draft is known from one pass over answers of the target."""
    prompt, count = PROMPTS[2], 3
    runner = speculative(graphs, "near", count)
    drawn = answer(runner, prompt, drawing)
    draft = GraphRunner(graphs["near"], 1, CONTEXT)
    points = np.random.default_rng(drawing.seed).random(NEW)
    logits = draft.logits(np.array([[*prompt, *drawn]]))[0, len(prompt) - 1 :]
    matches = [draw(logits[place], drawing, points[place]) == drawn[place] for place in range(1, NEW)]
    rounds, accepted = accepted_runs(matches, count)
    assert 0 < accepted < NEW - rounds
    assert (runner.accepted, runner.guessed) == (accepted, rounds * count)


def test_the_end_of_the_cache_is_reached(graphs):
    """Fewer tokens are guessed there; the last token needs no place."""
    prompt, new = PROMPTS[1], 20
    runner = speculative(graphs, "near", 6, len(prompt) + new - 1)
    alone = GraphRunner(graphs["itself"], 1, len(prompt) + new - 1)
    assert answer(runner, prompt, DRAWINGS[0], new) == answer(alone, prompt, DRAWINGS[0], new)


def test_logits_are_the_targets(graphs):
    alone, runner = GraphRunner(graphs["itself"], 1, CONTEXT), speculative(graphs, "near", 4)
    prompt = np.array([PROMPTS[1]])
    alone.reset()
    runner.reset()
    runner.begin(Drawing(), prompt.size)
    np.testing.assert_allclose(runner.run(prompt), alone.run(prompt), atol=1e-4)
    for token in answer(GraphRunner(graphs["near"], 1, CONTEXT), PROMPTS[1], Drawing(), 20):  # right by chance alone
        np.testing.assert_allclose(runner.run(np.array([[token]])), alone.run(np.array([[token]])), atol=1e-4)


def test_a_draft_of_other_tokens_is_refused(graphs, tmp_path):
    other = GraphRunner(written(tmp_path, 0.0, vocab_size=300), 1, CONTEXT)
    with pytest.raises(InputError, match="the draft has 300 tokens, its target 257"):
        SpeculativeRunner(GraphRunner(graphs["itself"], 1, CONTEXT), other, 2)


@pytest.mark.parametrize("drawing", DRAWINGS[:2], ids=["greedy", "top p"])
def test_slots_of_a_service_have_a_draft_each_and_answer_as_if_they_were_alone(graphs, drawing):
    """Its metrics tell how often it was right."""
    first = speculative(graphs, "near", 3)
    ended = [threading.Event() for _ in PROMPTS]
    answers: list[list[int]] = [[] for _ in PROMPTS]

    def job(place: int) -> Job:
        def on_token(token: Token) -> bool:
            answers[place].append(token.id)
            return True

        return Job(PROMPTS[place], NEW, drawing, frozenset(), on_token, lambda how: ended[place].set())

    with Service(lambda: Runners([first, first.another()]), len(PROMPTS)) as service:
        for place in range(len(PROMPTS)):
            service.submit(job(place))
        assert all(event.wait(60) for event in ended)
        told = metrics(service, None)
        guessed, accepted = service.guesses
    expected = [answer(speculative(graphs, "near", 3), prompt, drawing) for prompt in PROMPTS]
    assert answers == expected
    assert 0 < accepted < guessed
    assert f"edgeprune_draft_tokens_accepted_total {accepted}" in told
