"""Perplexity of held-out documents, and the interval of its rise from a dense to a fitted model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from edgeprune.model.decoder import Decoder
from edgeprune.model.forward import WeightStream, token_losses, weight_stream
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
    return text_losses(model.decoder, weight_stream(model), {"": documents}, length, on_layer)[""]


def text_losses(
    decoder: Decoder, weights: WeightStream, texts: Mapping[str, Sequence[np.ndarray]], length: int,
    on_layer: Callable[[], None] = lambda: None,
) -> dict[str, Losses]:  # fmt: skip
    """Losses of several texts, each of documents of token ids, in one pass over a stream of weights.

    So a model is evaluated while it is pruned, and is nowhere held whole.
    """
    windows = [
        (name, number, document[start : start + length])
        for name, documents in texts.items()
        for number, document in enumerate(documents)
        for start in range(0, len(document), length)
        if len(document) - start > 1
    ]
    ids = np.zeros((len(windows), max(len(window) for *_, window in windows)), dtype=np.int64)  # padded right: causal
    for row, (*_, window) in zip(ids, windows, strict=True):
        row[: len(window)] = window
    rows = token_losses(decoder, weights, torch.from_numpy(ids), on_layer=on_layer).numpy()
    losses = {
        name: Losses(np.zeros(len(documents)), np.zeros(len(documents), dtype=np.int64))
        for name, documents in texts.items()
    }
    for (name, number, window), row in zip(windows, rows, strict=True):
        losses[name].nats[number] += row[: len(window) - 1].sum()
        losses[name].tokens[number] += len(window) - 1
    return losses


def log_rise(dense: Losses, fitted: Losses, seed: int, draws: int = 2000) -> tuple[float, float, float]:
    """Rise of log perplexity in nats per token on the same documents, and its 95 % interval: low, high."""
    difference = fitted.nats - dense.nats
    picks = np.random.default_rng(seed).integers(len(difference), size=(draws, len(difference)))
    tokens = np.maximum(dense.tokens[picks].sum(axis=1), 1)
    low, high = np.quantile(difference[picks].sum(axis=1) / tokens, [0.025, 0.975])
    return float(difference.sum() / dense.tokens.sum()), float(low), float(high)


def rise(dense: Losses, fitted: Losses, seed: int) -> Rise:
    """Rise of perplexity from dense to fitted on the same documents."""
    return Rise(*(100.0 * float(np.expm1(value)) for value in log_rise(dense, fitted, seed)))
