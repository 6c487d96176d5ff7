import numpy as np
import pytest
import torch

from edgeprune.engine.onnx.graph import GraphVariant, write_graphs
from edgeprune.evaluate.perplexity import Losses, cut, document_losses, graph_losses, rise, text_losses, window_losses
from edgeprune.model.forward import weight_stream
from tests.support.tiny import as_model, llama

LENGTH = 16


def windows_of(document):
    return [document[s : s + LENGTH] for s in range(0, len(document), LENGTH) if len(document) - s > 1]


def documents_of(*sizes):
    generator = np.random.default_rng(0)
    return [generator.integers(0, 101, size) for size in sizes]


def test_losses_and_likeliest_tokens_are_transformers_window_by_window():
    reference = llama()
    documents = documents_of(30, 5, 17, 1, 33)
    losses = document_losses(as_model(reference), documents, LENGTH)
    for number, document in enumerate(documents):
        nats = 0.0
        for window, likeliest in zip(windows_of(document), losses.likeliest[number], strict=True):
            ids = torch.tensor(window)[None]
            with torch.no_grad():
                found = reference(ids, labels=ids)
            nats += float(found.loss) * (len(window) - 1)
            assert likeliest.tolist() == found.logits[0, :-1].argmax(dim=-1).tolist()
        assert losses.nats[number] == pytest.approx(nats, rel=1e-4, abs=1e-6)
        assert losses.tokens[number] == sum(len(w) - 1 for w in windows_of(document))
    assert losses.perplexity == pytest.approx(np.exp(losses.nats.sum() / losses.tokens.sum()))


def test_losses_of_a_graph_are_those_of_its_model(tmp_path):
    model, variant = as_model(llama()), GraphVariant("onnxruntime", "all")
    write_graphs(model.decoder, model.weights, tmp_path, "fp32", [variant])
    windows, calls = cut(documents_of(30, 5, 17, 1, 33), LENGTH), []
    found = graph_losses(tmp_path / variant.filename, windows, lambda: calls.append(1))
    expected = window_losses(model, windows)
    assert len(calls) == sum(map(len, windows))
    assert np.allclose(found.nats, expected.nats, rtol=1e-4, atol=1e-6)
    assert found.tokens.tolist() == expected.tokens.tolist()
    for mine, theirs in zip(found.likeliest, expected.likeliest, strict=True):
        assert [row.tolist() for row in mine] == [row.tolist() for row in theirs]


def test_texts_in_one_pass_are_as_each_by_itself():
    model = as_model(llama())
    texts = {"a": documents_of(30, 1), "b": documents_of(8, 40)}
    together = text_losses(model.decoder, weight_stream(model), texts, LENGTH)
    for name, documents in texts.items():
        alone = document_losses(model, documents, LENGTH)
        np.testing.assert_allclose(together[name].nats, alone.nats, rtol=1e-5)
        np.testing.assert_array_equal(together[name].tokens, alone.tokens)
        for found, expected in zip(together[name].likeliest, alone.likeliest, strict=True):
            assert [window.tolist() for window in found] == [window.tolist() for window in expected]


def test_windows_too_short_to_predict_count_nothing():
    model = as_model(llama())
    (document,) = documents_of(12)
    losses = window_losses(model, [[document], [document[:1], document[:0]], []])
    assert losses.tokens.tolist() == [11, 0, 0]
    assert losses.nats[1:].tolist() == [0, 0]
    assert [len(window) for window in losses.likeliest[1]] == [0, 0]


def test_cut_keeps_every_token_but_a_last_one_alone():
    documents = documents_of(33, 16, 1, 0)
    assert [[len(window) for window in windows] for windows in cut(documents, LENGTH)] == [[16, 16], [16], [], []]
    np.testing.assert_array_equal(np.concatenate(cut(documents, LENGTH)[0]), documents[0][:32])


def made_up():
    generator = np.random.default_rng(0)
    tokens = generator.integers(50, 100, 40)
    dense = Losses(3.0 * tokens + generator.normal(0, 5, 40), tokens, [[]] * 40)
    return dense, Losses(dense.nats + 0.1 * tokens + generator.normal(0, 1, 40), tokens, [[]] * 40)


def test_the_rise_is_that_of_the_perplexities_and_its_interval_holds_it():
    dense, fitted = made_up()
    result = rise(dense, fitted, seed=0)
    assert result.percent == pytest.approx(100 * (fitted.perplexity / dense.perplexity - 1))
    assert result.low < result.percent < result.high
    assert result.high - result.low < 1.5  # paired: the spread between documents cancels
    assert rise(dense, dense, seed=0).percent == 0


def test_more_tokens_for_the_same_text_do_not_make_it_better():
    """What counts is the text: the same nats over twice as many tokens are the same rise."""
    dense, fitted = made_up()
    spelled = Losses(fitted.nats, 2 * fitted.tokens, fitted.likeliest)
    assert rise(dense, spelled, seed=0) == rise(dense, fitted, seed=0)
    assert spelled.perplexity < dense.perplexity
    percent = rise(dense, spelled, seed=0).percent
    assert spelled.perplexity_per(dense) == pytest.approx(dense.perplexity * (1 + percent / 100))
