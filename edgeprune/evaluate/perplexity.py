"""Perplexity of held-out documents, and the interval of its rise from a dense to a fitted model."""

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
    """Of documents: summed negative log-likelihood in nats (documents,), predicted tokens (documents,), and the
    likeliest token int64 in the place of each predicted one, by document and window."""

    nats: np.ndarray
    tokens: np.ndarray
    likeliest: Windows

    @property
    def perplexity(self) -> float:
        return self.perplexity_per(self)

    def perplexity_per(self, other: Losses) -> float:
        """Per token of other losses of the same texts, which may be tokenised otherwise."""
        return float(np.exp(self.nats.sum() / other.tokens.sum()))


@dataclass(frozen=True)
class Rise:
    """Rise of perplexity in percent, with the 95 % interval of a paired bootstrap over documents."""

    percent: float
    low: float
    high: float


def cut(documents: Sequence[np.ndarray], length: int) -> list[list[np.ndarray]]:
    """Windows of at most `length` tokens of each document; one of a single token predicts nothing and is left out."""
    return [
        [document[start : start + length] for start in range(0, len(document), length) if len(document) - start > 1]
        for document in documents
    ]


def document_losses(
    model: Model, documents: Sequence[np.ndarray], length: int, on_layer: Callable[[], None] = lambda: None
) -> Losses:
    """Losses of documents of token ids, each cut into windows of at most `length` tokens.

    The first token of a window is not predicted. Every layer's weights are read once.
    """
    return window_losses(model, cut(documents, length), on_layer)


def window_losses(model: Model, windows: Windows, on_layer: Callable[[], None] = lambda: None) -> Losses:
    """The same of documents that are cut already."""
    return _losses(model.decoder, weight_stream(model), {"": windows}, on_layer)[""]


def text_losses(
    decoder: Decoder,
    weights: WeightStream,
    texts: Mapping[str, Sequence[np.ndarray]],
    length: int,
    on_layer: Callable[[], None] = lambda: None,
) -> dict[str, Losses]:
    """Losses of several texts, each of documents of token ids, in one pass over a stream of weights.

    So a model is evaluated while it is pruned, and is nowhere held whole.
    """
    return _losses(decoder, weights, {name: cut(documents, length) for name, documents in texts.items()}, on_layer)


def _losses(
    decoder: Decoder, weights: WeightStream, texts: Mapping[str, Windows], on_layer: Callable[[], None]
) -> dict[str, Losses]:
    flat = [window for documents in texts.values() for windows in documents for window in windows]
    ids = np.zeros((len(flat), max(map(len, flat))), dtype=np.int64)  # padded right: causal
    for row, window in zip(ids, flat, strict=True):
        row[: len(window)] = window
    predictions = token_predictions(decoder, weights, torch.from_numpy(ids), on_layer=on_layer)
    rows = zip(*(of.numpy() for of in predictions), strict=True)
    found = {}
    for name, documents in texts.items():
        nats, tokens, likeliest = np.zeros(len(documents)), np.zeros(len(documents), dtype=np.int64), []
        for number, windows in enumerate(documents):
            likeliest.append([])
            for window in windows:
                count, (losses, guesses) = max(0, len(window) - 1), next(rows)
                nats[number] += losses[:count].sum()
                tokens[number] += count
                likeliest[-1].append(guesses[:count])
        found[name] = Losses(nats, tokens, likeliest)
    return found


def log_rise(dense: Losses, fitted: Losses, seed: int, draws: int = 2000) -> tuple[float, float, float]:
    """Rise of log perplexity on the same documents in nats per token of the dense model's, and its 95 % interval:
    low, high. The fitted model's tokens may be others: what it needs for the text counts, however it is spelled."""
    difference = fitted.nats - dense.nats
    picks = np.random.default_rng(seed).integers(len(difference), size=(draws, len(difference)))
    tokens = np.maximum(dense.tokens[picks].sum(axis=1), 1)
    low, high = np.quantile(difference[picks].sum(axis=1) / tokens, [0.025, 0.975])
    return float(difference.sum() / dense.tokens.sum()), float(low), float(high)


def rise(dense: Losses, fitted: Losses, seed: int) -> Rise:
    """Rise of perplexity from dense to fitted on the same documents."""
    return Rise(*(100.0 * float(np.expm1(value)) for value in log_rise(dense, fitted, seed)))
