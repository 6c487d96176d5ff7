import numpy as np
import pytest
import torch

from edgeprune.engine.onnx.graph import GraphVariant, write_graphs
from edgeprune.evaluate import likelihoods
from edgeprune.evaluate.likelihoods import Continuation, GraphLikelihoods, ModelLikelihoods
from tests.support.tiny import as_model, llama

VARIANT = GraphVariant("onnxruntime", "all")


def asked():
    """Choices of three questions, out of order, one with an empty rest of its beginning in common with another."""
    generator = np.random.default_rng(0)
    contexts = [generator.integers(0, 101, size) for size in (1, 9, 30)]
    choices = [
        Continuation(np.concatenate([context, generator.integers(0, 101, size)]), len(context))
        for context in contexts
        for size in (1, 4, 4, 7)
    ]
    return [choices[place] for place in generator.permutation(len(choices))]


def expected(reference, one):
    """The likelihood by transformers' own model, one sequence at a time."""
    ids = torch.from_numpy(one.ids)
    with torch.no_grad():
        logits = reference(ids[None]).logits[0, one.start - 1 : -1].log_softmax(dim=-1)
    targets = ids[one.start :]
    return float(logits.gather(1, targets[:, None]).sum()), bool((logits.argmax(dim=-1) == targets).all())


def check(found, reference, questions):
    for (nats, is_greedy), one in zip(found, questions, strict=True):
        true_nats, true_greedy = expected(reference, one)
        assert nats == pytest.approx(true_nats, rel=1e-4, abs=1e-5)
        assert is_greedy == true_greedy


@pytest.mark.parametrize("most", [1 << 14, 40])  # in one batch, and in several
def test_likelihoods_of_a_model_are_transformers(monkeypatch, most):
    monkeypatch.setattr(likelihoods, "WALK_TOKENS", most)
    reference, calls = llama(), []
    found = ModelLikelihoods(as_model(reference), 64).of(asked(), lambda: calls.append(1))
    check(found, reference, asked())
    assert len(calls) == len(asked())


@pytest.mark.parametrize("step", [256, 3])  # fed at once, and in steps
def test_likelihoods_of_a_graph_are_transformers_though_beginnings_are_fed_once(tmp_path, monkeypatch, step):
    monkeypatch.setattr(likelihoods, "STEP_TOKENS", step)
    reference = llama()
    model = as_model(reference)
    write_graphs(model.decoder, model.weights, tmp_path, "fp32", [VARIANT], 64)
    graph = GraphLikelihoods(tmp_path / VARIANT.filename, 64, exact=False)
    fed = []
    feed = graph._runner.logits
    monkeypatch.setattr(graph._runner, "logits", lambda ids: fed.append(ids.shape[1]) or feed(ids))
    check(graph.of(asked()), reference, asked())
    assert sum(fed) < 0.6 * sum(len(one.ids) - 1 for one in asked())
    assert graph.vocab_size == 101


def test_a_greedy_continuation_is_known():
    reference = llama()
    ids = torch.arange(5)[None]
    with torch.no_grad():
        for _ in range(3):
            ids = torch.cat([ids, reference(ids).logits[:, -1:].argmax(dim=-1)], dim=1)
    one = Continuation(ids[0].numpy(), 5)
    other = Continuation(np.append(ids[0, :-1].numpy(), (ids[0, -1].item() + 1) % 101), 5)
    found = ModelLikelihoods(as_model(reference), 64).of([one, other])
    assert [is_greedy for _, is_greedy in found] == [True, False]
