import numpy as np
import pytest
import torch

from edgeprune.evaluate.perplexity import Losses, document_losses, rise
from tests.tiny import as_model, llama


def test_losses_are_transformers_losses_window_by_window():
    reference = llama()
    generator = np.random.default_rng(0)
    documents = [generator.integers(0, 101, size) for size in (30, 5, 17, 1, 33)]
    losses = document_losses(as_model(reference), documents, length=16)
    for number, document in enumerate(documents):
        windows = [document[s : s + 16] for s in range(0, len(document), 16) if len(document) - s > 1]
        nats = sum(
            float(reference(torch.tensor(w)[None], labels=torch.tensor(w)[None]).loss) * (len(w) - 1) for w in windows
        )
        assert losses.nats[number] == pytest.approx(nats, rel=1e-4, abs=1e-6)
        assert losses.tokens[number] == sum(len(w) - 1 for w in windows)
    assert losses.perplexity == pytest.approx(np.exp(losses.nats.sum() / losses.tokens.sum()))


def test_the_rise_is_that_of_the_perplexities_and_its_interval_holds_it():
    generator = np.random.default_rng(0)
    tokens = generator.integers(50, 100, 40)
    dense = Losses(3.0 * tokens + generator.normal(0, 5, 40), tokens)
    fitted = Losses(dense.nats + 0.1 * tokens + generator.normal(0, 1, 40), tokens)
    result = rise(dense, fitted, seed=0)
    assert result.percent == pytest.approx(100 * (fitted.perplexity / dense.perplexity - 1))
    assert result.low < result.percent < result.high
    assert result.high - result.low < 1.5  # paired: the spread between documents cancels
    assert rise(dense, dense, seed=0).percent == 0
