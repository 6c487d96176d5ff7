"""Perplexity of held-out documents, and the interval of its rise from a dense to a fitted model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from edgeprune.model.forward import token_losses, weight_stream
from edgeprune.model.model import Model


@dataclass(frozen=True)
class Losses:
    """Summed negative log-likelihood in nats (documents,) and predicted tokens (documents,)."""

    nats: np.ndarray
    tokens: np.ndarray

    @property
    def perplexity(self) -> float:
        return float(np.exp(self.nats.sum() / self.tokens.sum()))


@dataclass(frozen=True)
class Rise:
    """Rise of perplexity in percent, with the 95 % interval of a paired bootstrap over documents."""

    percent: float
    low: float
    high: float


def document_losses(
    model: Model, documents: Sequence[np.ndarray], length: int, on_layer: Callable[[], None] = lambda: None
) -> Losses:
    """Losses of documents of token ids, each cut into windows of at most `length` tokens.

    The first token of a window is not predicted. Every layer's weights are read once.
    """
    windows = [
        (number, document[start : start + length])
        for number, document in enumerate(documents)
        for start in range(0, len(document), length)
        if len(document) - start > 1
    ]
    ids = np.zeros((len(windows), max(len(w) for _, w in windows)), dtype=np.int64)  # padded right: causal
    for row, (_, window) in zip(ids, windows, strict=True):
        row[: len(window)] = window
    losses = token_losses(model.decoder, weight_stream(model), torch.from_numpy(ids), on_layer=on_layer).numpy()
    nats, tokens = np.zeros(len(documents)), np.zeros(len(documents), dtype=np.int64)
    for (number, window), row in zip(windows, losses, strict=True):
        nats[number] += row[: len(window) - 1].sum()
        tokens[number] += len(window) - 1
    return Losses(nats, tokens)


def rise(dense: Losses, fitted: Losses, seed: int, draws: int = 2000) -> Rise:
    """Rise of perplexity from dense to fitted on the same documents."""
    difference = fitted.nats - dense.nats
    picks = np.random.default_rng(seed).integers(len(difference), size=(draws, len(difference)))
    tokens = np.maximum(dense.tokens[picks].sum(axis=1), 1)
    low, high = np.quantile(difference[picks].sum(axis=1) / tokens, [0.025, 0.975])
    center = difference.sum() / dense.tokens.sum()
    return Rise(*(100.0 * float(np.expm1(value)) for value in (center, low, high)))
