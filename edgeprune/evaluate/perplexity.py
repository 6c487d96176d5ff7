"""The perplexity of held-out documents, and the interval of its rise from a dense to a fitted model.

It knows token ids and no tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from edgeprune.model.decoder import Decoder
from edgeprune.model.forward import WeightStream, token_predictions, weight_stream
from edgeprune.model.model import Model

Windows = Sequence[Sequence[np.ndarray]]  # token ids, by document


@dataclass(frozen=True)
class Losses:
    """The losses of a model on documents.

    nats: (documents,) summed negative log-likelihood. tokens: (documents,) int64, how many were predicted. likeliest:
    by document and window, the likeliest token, int64, in the place of each predicted one.
    """

    nats: np.ndarray
    tokens: np.ndarray
    likeliest: Windows

    @property
    def perplexity(self) -> float:
        """Returns the perplexity per token of these losses."""
        return self.perplexity_per(self)

    def perplexity_per(self, other: Losses) -> float:
        """Returns the perplexity per token of other losses of the same texts, which may be tokenised otherwise."""
        return float(np.exp(self.nats.sum() / other.tokens.sum()))


@dataclass(frozen=True)
class Rise:
    """The rise of perplexity in percent, with the 95 % interval of a paired bootstrap over documents."""

    percent: float
    low: float
    high: float


def cut(documents: Sequence[np.ndarray], length: int) -> list[list[np.ndarray]]:
    """Returns the windows of at most `length` tokens of each document, (tokens,) each.

    A window of a single token predicts nothing and is left out.
    """
    return [
        [document[start : start + length] for start in range(0, len(document), length) if len(document) - start > 1]
        for document in documents
    ]


def document_losses(
    model: Model, documents: Sequence[np.ndarray], length: int, on_layer: Callable[[], None] = lambda: None
) -> Losses:
    """Returns the losses of documents of token ids, each cut into windows of at most `length` tokens.

    The first token of a window is not predicted. The weights of every layer are read once.
    """
    return window_losses(model, cut(documents, length), on_layer)


def window_losses(model: Model, windows: Windows, on_layer: Callable[[], None] = lambda: None) -> Losses:
    """Returns the losses of documents that are already cut into windows."""
    return _losses(model.decoder, weight_stream(model), {"": windows}, on_layer)[""]


def text_losses(
    decoder: Decoder,
    weights: WeightStream,
    texts: Mapping[str, Sequence[np.ndarray]],
    length: int,
    on_layer: Callable[[], None] = lambda: None,
) -> dict[str, Losses]:
    """Returns the losses of several texts, each of documents of token ids, in one pass over a stream of weights.

    A model can thus be evaluated while it is pruned, and is never in memory as a whole.
    """
    return _losses(decoder, weights, {name: cut(documents, length) for name, documents in texts.items()}, on_layer)


def _losses(
    decoder: Decoder, weights: WeightStream, texts: Mapping[str, Windows], on_layer: Callable[[], None]
) -> dict[str, Losses]:
    """Returns the losses of several texts, each of documents cut into windows, in one pass over the weights."""
    # All windows are rows of one batch, padded on the right: a causal model is not affected by it.
    flat = [window for documents in texts.values() for windows in documents for window in windows]
    ids = np.zeros((len(flat), max(map(len, flat))), dtype=np.int64)  # (windows, longest)
    for row, window in zip(ids, flat, strict=True):
        row[: len(window)] = window
    # Losses and likeliest tokens of all windows: (windows, longest - 1) each.
    predictions = token_predictions(decoder, weights, torch.from_numpy(ids), on_layer=on_layer)
    predicted = zip(*(values.numpy() for values in predictions), strict=True)
    # Gather the rows by text and document; the padding is left out.
    losses_of = {}
    for name, documents in texts.items():
        nats, tokens, likeliest = np.zeros(len(documents)), np.zeros(len(documents), dtype=np.int64), []
        for number, windows in enumerate(documents):
            likeliest.append([])
            for window in windows:
                count, (losses, guesses) = max(0, len(window) - 1), next(predicted)
                nats[number] += losses[:count].sum()
                tokens[number] += count
                likeliest[-1].append(guesses[:count])
        losses_of[name] = Losses(nats, tokens, likeliest)
    return losses_of


def log_rise(dense: Losses, fitted: Losses, seed: int, draws: int = 2000) -> tuple[float, float, float]:
    """Returns the rise of log perplexity on the same documents, and its 95 % interval: (rise, low, high).

    It is in nats per token of the dense model. The fitted model may have other tokens: what counts is what it needs for
    the whole text, however that is tokenised.
    """
    difference = fitted.nats - dense.nats  # (documents,)
    drawn = np.random.default_rng(seed).integers(len(difference), size=(draws, len(difference)))  # (draws, documents)
    tokens = np.maximum(dense.tokens[drawn].sum(axis=1), 1)  # (draws,)
    low, high = np.quantile(difference[drawn].sum(axis=1) / tokens, [0.025, 0.975])
    return float(difference.sum() / dense.tokens.sum()), float(low), float(high)


def rise(dense: Losses, fitted: Losses, seed: int) -> Rise:
    """Returns the rise of perplexity from dense to fitted on the same documents, in percent."""
    return Rise(*(100.0 * float(np.expm1(value)) for value in log_rise(dense, fitted, seed)))
