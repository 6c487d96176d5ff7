"""The ladder of vocabularies of a run on a small model with a real byte-level tokenizer."""

from __future__ import annotations

import numpy as np
import pytest

from edgeprune.model.load import load_model
from edgeprune.model.tokens.tokenizer import load_tokenizer
from edgeprune.progress import Silent
from edgeprune.search import vocabularies
from edgeprune.search.vocabularies import FIRST_MULTIPLE, GROWTH, measure_losses, vocabularies_of


@pytest.fixture(scope="module")
def demo():  # noqa: ANN201
    return load_model("demo")


def samples_of(model, texts: list[str], length: int) -> np.ndarray:  # noqa: ANN001
    tokenizer = load_tokenizer(model.directory)
    ids = np.concatenate([np.array(tokenizer(text)["input_ids"]) for text in texts])
    rows = len(ids) // length
    return ids[: rows * length].reshape(rows, length)


@pytest.mark.slow
@pytest.mark.demo
def test_vocabularies_hold_the_samples_and_grow(demo) -> None:  # noqa: ANN001
    samples = samples_of(demo, ["The quick brown fox jumps over the lazy dog. " * 8], 16)
    found = vocabularies_of(demo, samples, None)
    sizes = [vocabulary.size for vocabulary in found]
    assert sizes == [sizes[0] * GROWTH**step for step in range(len(sizes))]
    assert sizes[0] % FIRST_MULTIPLE == 0
    assert sizes[-1] < demo.decoder.vocab_size
    for vocabulary, larger in zip(found, found[1:], strict=False):
        assert set(vocabulary.kept) <= set(larger.kept)
    assert found[0].keeps(samples.ravel()).all()


@pytest.mark.slow
@pytest.mark.demo
def test_losses_are_of_text_that_the_vocabulary_was_not_made_for(demo, monkeypatch) -> None:  # noqa: ANN001
    """The two halves speak of different things: the smallest vocabulary must cost, and larger ones less."""
    monkeypatch.setattr(vocabularies, "GROWTH", 16)
    cooking = "Melt the butter, whisk in the flour and simmer the sauce with nutmeg until it thickens. "
    sailing = "Hoist the spinnaker, ease the mainsheet and steer to leeward of the buoy at the headland. "
    samples = samples_of(demo, [cooking * 6, sailing * 6], 32)
    losses = measure_losses(demo, samples, None, Silent())
    sizes = [str(vocabulary.size) for vocabulary in vocabularies_of(demo, samples, None)]
    assert list(losses) == sizes
    assert losses[sizes[0]] > 0.05
    assert losses[sizes[-1]] < losses[sizes[0]]
