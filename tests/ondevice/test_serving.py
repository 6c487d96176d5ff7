"""The service of many requests, on the real graph of a small random model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edgeprune.engine.onnx.graph import ONNXRUNTIME_GRAPH, write_graphs
from edgeprune.errors import EngineError
from edgeprune.ondevice.onnxruntime import GraphRunner
from edgeprune.ondevice.sampling import Drawing, generate
from edgeprune.ondevice.serving import FULL, PART, STOPPED, Busy, Job, Runners, Service, Token, common
from tests.support.graph_models import llama
from tests.support.reference import decoder_of, weights_of

CONTEXT, SECONDS = 4 * PART, 60
GREEDY = Drawing()
GENERATOR = np.random.default_rng(0)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, folder = llama(True, vocab_size=257, max_position_embeddings=CONTEXT), tmp_path_factory.mktemp("graph")
    files = write_graphs(decoder_of(model.config), weights_of(model), folder, "fp32", [ONNXRUNTIME_GRAPH])
    return files.graphs[ONNXRUNTIME_GRAPH]


def opened(graph: Path, slots: int, waiting: int = 8) -> Service:
    return Service(lambda: Runners.of_rows(GraphRunner(graph, slots, CONTEXT)), waiting)


@pytest.fixture
def service(graph: Path) -> Iterator[Service]:
    with opened(graph, 3) as service:
        yield service


class Client:
    """What came of a job: its tokens, and how it ended."""

    def __init__(self, prompt: list[int], most: int = 12, drawing: Drawing = GREEDY, **job: object) -> None:
        self.tokens: list[Token] = []
        self.ended, self.how = threading.Event(), None
        self.job = Job(prompt, most, drawing, frozenset(), self.on_token, self.on_end, **job)

    def on_token(self, token: Token) -> bool:
        self.tokens.append(token)
        return True

    def on_end(self, how: str | Exception) -> None:
        self.how = how
        self.ended.set()

    def result(self) -> list[int]:
        assert self.ended.wait(SECONDS)
        return [token.id for token in self.tokens]


def ids(length: int) -> list[int]:
    return GENERATOR.integers(1, 257, length).tolist()


def alone(graph: Path, *clients: Client) -> list[list[int]]:
    """What the same jobs are answered one after the other, each by a service of its own."""
    answers = []
    for one in clients:
        with opened(graph, 1) as service:
            again = Client(list(one.job.prompt), one.job.most, one.job.drawing)
            service.submit(again.job)
            answers.append(again.result())
    return answers


def test_an_answer_is_what_the_runner_generates(graph: Path, service: Service) -> None:
    client = Client(ids(5))
    service.submit(client.job)
    expected = [int(tokens[0]) for tokens in generate(GraphRunner(graph, 1, CONTEXT), [client.job.prompt], 12)]
    assert client.result() == expected
    assert client.how == FULL


def test_requests_side_by_side_are_answered_as_if_they_were_alone(graph: Path, service: Service) -> None:
    """Prompts of one part and of several, more of them than slots, greedy and drawn."""
    clients = [Client(ids(length), 20, Drawing(0.8, 0.9, 40, length)) for length in (3, PART + 7, 2 * PART)]
    clients += [Client(ids(length), 20) for length in (PART, 9, 3 * PART, PART - 1, 5)]
    for client in clients:
        service.submit(client.job)
    assert [client.result() for client in clients] == alone(graph, *clients)


def test_a_beginning_is_used_again_wherever_it_is_held(graph: Path, service: Service) -> None:
    """By another slot it is copied; only whole parts are, and a last token is left to be read."""
    beginning = ids(2 * PART)
    first = Client([*beginning, *ids(5)])
    service.submit(first.job)
    first.result()
    others = [Client([*beginning, *ids(length)], 8) for length in (3, 40, PART)]
    whole = Client(list(beginning), 8)
    for client in (*others, whole):
        service.submit(client.job)
    assert [client.result() for client in (*others, whole)] == alone(graph, *others, whole)
    assert [client.job.reused for client in others] == [2 * PART] * 3
    assert whole.job.reused == PART
    assert service.counts.reused_tokens == 7 * PART


@pytest.mark.parametrize(
    ("held", "prompt", "expected"),
    [
        (PART, PART + 1, PART),
        (PART, PART, 0),
        (3 * PART, 3 * PART, 2 * PART),
        (PART - 1, 2 * PART, 0),
        (2 * PART, PART + 5, PART),
    ],
)
def test_a_prompt_shares_whole_parts(held: int, prompt: int, expected: int) -> None:
    tokens = ids(4 * PART)
    assert common(tokens[:held], tokens[:prompt]) == expected
    assert common([*tokens[: PART - 1], -1, *tokens[PART:held]], tokens[:prompt]) == 0


def test_an_end_token_or_the_client_ends_an_answer(service: Service) -> None:
    client = Client(ids(5))
    service.submit(client.job)
    drawn = client.result()
    place = next(index for index in range(1, 12) if drawn[index] not in drawn[:index])
    ended = Client(list(client.job.prompt))
    ended.job.ends = frozenset({drawn[place]})
    stopped = Client(list(client.job.prompt))
    stopped.job.on_token = lambda token: stopped.on_token(token) and len(stopped.tokens) < 3
    for one in (ended, stopped):
        service.submit(one.job)
    assert ended.result() == drawn[:place]
    assert stopped.result() == drawn[:3]
    assert ended.how == stopped.how == STOPPED


def test_log_probabilities_are_those_of_the_softmax(graph: Path, service: Service) -> None:
    client = Client(ids(5), 2, likeliest=3)
    service.submit(client.job)
    client.result()
    logits = GraphRunner(graph, 1, CONTEXT).run(np.array([client.job.prompt]))[0].astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum())
    first = client.tokens[0]
    assert first.logprob == pytest.approx(logprobs[first.id], abs=1e-6)
    best = np.argsort(-logprobs)[:3]
    assert [one for one, _ in first.likeliest] == best.tolist()
    assert [value for _, value in first.likeliest] == pytest.approx(logprobs[best].tolist(), abs=1e-6)


def test_more_than_the_queue_holds_are_refused_and_the_others_answered(graph: Path) -> None:
    with opened(graph, 1, waiting=2) as service:
        hold = threading.Event()
        first = Client(ids(4))
        first.job.on_token = lambda token: first.on_token(token) and hold.wait(SECONDS)
        service.submit(first.job)
        while not first.tokens:
            hold.wait(0.01)
        others = [Client(ids(4), 3) for _ in range(2)]
        for client in others:
            service.submit(client.job)
        assert service.waiting == 2
        with pytest.raises(Busy) as refused:
            service.submit(Client(ids(4)).job)
        assert 1 <= refused.value.seconds <= 60
        hold.set()
        assert all(len(client.result()) == client.job.most for client in (first, *others))
        assert (service.counts.ended, service.counts.refused) == (3, 1)


def test_a_job_whose_client_went_away_frees_its_slot(graph: Path) -> None:
    """While it is answered, and while it waits."""
    with opened(graph, 1) as service:
        gone = Client(ids(4), CONTEXT - 10)
        gone.job.on_token = lambda token: setattr(gone.job, "cancelled", True) or gone.on_token(token)
        service.submit(gone.job)
        waiting = Client(ids(4))
        waiting.job.cancelled = True
        service.submit(waiting.job)
        last = Client(ids(4), 3)
        service.submit(last.job)
        assert len(last.result()) == 3
        assert len(gone.tokens) == 1
        assert not waiting.tokens
        assert service.counts.cancelled == 2
        assert not gone.ended.is_set()


def test_an_error_ends_its_own_request_alone(graph: Path) -> None:
    with opened(graph, 1) as service:
        too_long = Client(ids(CONTEXT), 5)
        broken = Client(ids(3))
        broken.job.on_token = lambda token: 1 / 0
        fine = Client(ids(3), 4)
        for client in (too_long, broken, fine):
            service.submit(client.job)
        assert len(fine.result()) == 4
        assert isinstance(too_long.how, EngineError)
        assert isinstance(broken.how, ZeroDivisionError)
        assert service.counts.failed == 2


def test_what_fails_to_open_is_told_to_who_opens_it() -> None:
    def runners() -> Runners:
        raise EngineError("no graph", "Write one.")

    with pytest.raises(EngineError, match="no graph"):
        Service(runners, 1)
    assert not [thread for thread in threading.enumerate() if thread.name == "engine"]
