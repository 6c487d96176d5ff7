"""The vocabularies that a run may choose from, and the loss that each is predicted to cost.

It does not know what a vocabulary saves on the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from edgeprune.files import scratch_folder
from edgeprune.model.model import Model
from edgeprune.model.tokens.vocabulary import Vocabulary, ladder, needed, padded, retokenized, write_tokenizer_files
from edgeprune.progress import Progress

if TYPE_CHECKING:
    import torch

GROWTH = 2  # factor from one size to the next
FIRST_MULTIPLE = 64  # that the smallest size is padded to: it is the width of the head's product
TEST_SAMPLES = 8  # samples, at most, on which losses are measured


def vocabularies_of(model: Model, calibration: np.ndarray, generated: np.ndarray | None) -> list[Vocabulary]:
    """Returns the vocabulary that the samples need, and larger ones below the whole one, each GROWTH times the last.

    calibration, generated: token ids (samples, tokens) of the user's samples and of the model's own.
    """
    return _ladder(model, _used(calibration, generated))


def _used(*arrays: np.ndarray | None) -> np.ndarray:
    """Returns the sorted token ids (any,) that occur in the arrays."""
    return np.unique(np.concatenate([array.ravel() for array in arrays if array is not None]))


def _ladder(model: Model, used: np.ndarray) -> list[Vocabulary]:
    """Returns the vocabulary of the used tokens, and larger ones below the whole one, each GROWTH times the last."""
    smallest = padded(model.directory, needed(model.directory, used), FIRST_MULTIPLE)
    sizes, size = [], GROWTH * smallest.size
    while size < model.decoder.vocab_size / 1.25:
        sizes.append(size)
        size *= GROWTH
    vocabularies = [smallest, *ladder(model.directory, smallest, sizes)]
    return [vocabulary for vocabulary in vocabularies if vocabulary.size < model.decoder.vocab_size]


def measure_losses(
    model: Model, calibration: np.ndarray, generated: np.ndarray | None, progress: Progress
) -> dict[str, float]:
    """Returns the rise of the loss in nats per token over the whole vocabulary, by the size of each of vocabularies_of.

    calibration, generated: token ids (samples, tokens) of the user's samples and of the model's own. Every token of
    the samples is in all of these vocabularies, so that the samples cannot measure the loss on new text. Instead, one
    half of the user's samples makes vocabularies in the same way, and the loss is measured on the other half, spelled
    with the tokens of these.
    """
    from edgeprune.evaluate.perplexity import text_losses
    from edgeprune.model.forward import weight_stream

    half = len(calibration) // 2
    ladder_of_all = vocabularies_of(model, calibration, generated)
    if half == 0:
        return {str(vocabulary.size): 0.0 for vocabulary in ladder_of_all}
    # Make the vocabularies of one half of the samples.
    tests = calibration[:half][:TEST_SAMPLES]
    from_half = _ladder(model, _used(calibration[half:], generated))
    advance = progress.stage("measure vocabularies", (1 + len(from_half)) * len(model.decoder.layers))
    length = 2 * tests.shape[1]  # a text that is spelled in pieces stays in one window

    def nats(vocabulary: Vocabulary | None, documents: list[np.ndarray]) -> float:
        decoder = model.decoder if vocabulary is None else model.decoder.with_vocabulary(vocabulary.size)
        stream = weight_stream(model) if vocabulary is None else _restricted(weight_stream(model), vocabulary)
        return float(text_losses(decoder, stream, {"": documents}, length, advance)[""].nats.sum())

    # Compare the other half, spelled with each of them, to its loss in the whole vocabulary.
    whole = nats(None, list(tests))
    tokens = sum(len(document) - 1 for document in tests)
    rises = []
    for vocabulary in from_half:
        with scratch_folder() as folder:
            write_tokenizer_files(model.directory, folder, vocabulary)
            documents = retokenized(list(tests), model.directory, folder)
        rises.append((nats(vocabulary, documents) - whole) / tokens)
    # Half of the samples need fewer tokens than all of them, so that the two ladders differ in their sizes; their
    # steps from the smallest one up correspond. Where the ladder of the half is shorter, its last rise stands for more.
    rises += rises[-1:] * (len(ladder_of_all) - len(rises))
    return {str(vocabulary.size): max(0.0, rise) for vocabulary, rise in zip(ladder_of_all, rises, strict=False)}


def _restricted(
    stream: Iterator[tuple[str, torch.Tensor]], vocabulary: Vocabulary
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields a model's weights by name, of embedding and head only the rows of the kept tokens."""
    import torch

    kept = torch.from_numpy(vocabulary.kept)
    for name, tensor in stream:
        yield name, tensor[kept] if name in ("embedding", "head") else tensor
