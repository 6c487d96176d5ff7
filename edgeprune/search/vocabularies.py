"""The vocabularies that a run may choose from, and what each is predicted to cost in quality."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

from edgeprune.model.model import Model
from edgeprune.model.tokens.vocabulary import Vocabulary, ladder, needed, padded, retokenized, write_tokenizer_files
from edgeprune.progress import Progress

if TYPE_CHECKING:
    import torch

GROWTH = 2  # from one size to the next
FIRST_MULTIPLE = 64  # of the smallest size: the head's width
TEST_SAMPLES = 8  # that losses are measured on


def vocabularies_of(model: Model, calibration: np.ndarray, generated: np.ndarray | None) -> list[Vocabulary]:
    """Returns the vocabulary that the samples need, and larger ones below the whole one, each GROWTH times the last.

    calibration, generated: token ids (samples, tokens) of the user's samples and of the model's own.
    """
    return _ladder(model, _used(calibration, generated))


def _used(*arrays: np.ndarray | None) -> np.ndarray:
    return np.unique(np.concatenate([array.ravel() for array in arrays if array is not None]))


def _ladder(model: Model, used: np.ndarray) -> list[Vocabulary]:
    smallest = padded(model.directory, needed(model.directory, used), FIRST_MULTIPLE)
    sizes, size = [], GROWTH * smallest.size
    while size < model.decoder.vocab_size / 1.25:
        sizes.append(size)
        size *= GROWTH
    found = [smallest, *ladder(model.directory, smallest, sizes)]
    return [vocabulary for vocabulary in found if vocabulary.size < model.decoder.vocab_size]


def measure_losses(
    model: Model, calibration: np.ndarray, generated: np.ndarray | None, progress: Progress
) -> dict[str, float]:
    """Returns the rise of the loss in nats per token of the whole vocabulary, by size of those of vocabularies_of.

    Every token of the samples is in all of them, so the samples themselves say nothing about new text: one half
    of them makes vocabularies as all of them do, the other half is spelled and predicted with these.
    """
    from edgeprune.evaluate.perplexity import text_losses
    from edgeprune.model.forward import weight_stream

    half = len(calibration) // 2
    ladder_of_all = vocabularies_of(model, calibration, generated)
    if half == 0:
        return {str(found.size): 0.0 for found in ladder_of_all}
    tests = calibration[:half][:TEST_SAMPLES]
    from_half = _ladder(model, _used(calibration[half:], generated))
    advance = progress.stage("measure vocabularies", (1 + len(from_half)) * len(model.decoder.layers))
    length = 2 * tests.shape[1]  # a text that is spelled in pieces stays in one window

    def nats(vocabulary: Vocabulary | None, documents: list[np.ndarray]) -> float:
        decoder = model.decoder if vocabulary is None else model.decoder.with_vocabulary(vocabulary.size)
        stream = weight_stream(model) if vocabulary is None else _restricted(weight_stream(model), vocabulary)
        return float(text_losses(decoder, stream, {"": documents}, length, advance)[""].nats.sum())

    whole = nats(None, list(tests))
    tokens = sum(len(document) - 1 for document in tests)
    rises = []
    for vocabulary in from_half:
        with TemporaryDirectory() as folder:
            write_tokenizer_files(model.directory, Path(folder), vocabulary)
            documents = retokenized(list(tests), model.directory, Path(folder))
        rises.append((nats(vocabulary, documents) - whole) / tokens)
    # Half of the samples need fewer tokens than all: step by step from the smallest, both ladders are alike.
    rises += rises[-1:] * (len(ladder_of_all) - len(rises))
    return {str(found.size): max(0.0, rise) for found, rise in zip(ladder_of_all, rises, strict=False)}


def _restricted(
    stream: Iterator[tuple[str, torch.Tensor]], vocabulary: Vocabulary
) -> Iterator[tuple[str, torch.Tensor]]:
    """A model's weights with the rows of the kept tokens alone."""
    import torch

    kept = torch.from_numpy(vocabulary.kept)
    for name, tensor in stream:
        yield name, tensor[kept] if name in ("embedding", "head") else tensor
