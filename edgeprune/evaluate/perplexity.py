"""The perplexity of held-out documents, and the interval of its rise from a dense to a fitted model.

It knows token ids and no tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from edgeprune.model.decoder import Decoder
from edgeprune.model.forward import CHUNK_TOKENS, WeightStream, final_states, predictions, weight_stream
from edgeprune.model.model import Model
from edgeprune.ondevice.onnxruntime import GraphRunner

Windows = Sequence[Sequence[np.ndarray]]  # token ids, by document
Predict = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


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


def predicted_losses(predict: Predict, texts: Mapping[str, Sequence[np.ndarray]], length: int) -> dict[str, Losses]:
    """Returns the losses of several texts, each of documents of token ids, by a model with a forward pass of its own.

    predict: losses and likeliest tokens of rows of ids (b, t), both (b, t - 1).
    """
    return _predicted(predict, {name: cut(documents, length) for name, documents in texts.items()})


def graph_losses(graph: Path, windows: Windows, on_window: Callable[[], None] = lambda: None) -> Losses:
    """Returns the losses of documents that are already cut into windows, by a graph in ONNX Runtime as it is deployed.

    graph: of the onnxruntime dialect, with the logits of all positions, for as many positions as a window has but its
    last token, which is not fed; on_window is called after every window. Raises
    EngineError.
    """
    ids = padded([window for document in windows for window in document])  # (windows, longest)
    runner = GraphRunner(graph, 1, ids.shape[1])
    losses, likeliest = np.zeros((len(ids), ids.shape[1] - 1)), np.zeros((len(ids), ids.shape[1] - 1), np.int64)
    for row, window in enumerate(ids):
        runner.reset()
        logits = torch.from_numpy(runner.logits(window[None, :-1])[0]).float()  # (longest - 1, vocabulary)
        losses[row] = F.cross_entropy(logits, torch.from_numpy(window[1:]), reduction="none").double().numpy()
        likeliest[row] = logits.argmax(dim=-1).numpy()
        on_window()
    return _gathered({"": windows}, zip(losses, likeliest, strict=True))[""]


def padded(windows: Sequence[np.ndarray]) -> np.ndarray:
    """Returns windows as rows (windows, longest) int64, padded on the right: a causal model is not affected by it."""
    ids = np.zeros((len(windows), max(map(len, windows))), dtype=np.int64)
    for row, window in zip(ids, windows, strict=True):
        row[: len(window)] = window
    return ids


def _losses(
    decoder: Decoder, weights: WeightStream, texts: Mapping[str, Windows], on_layer: Callable[[], None]
) -> dict[str, Losses]:
    """Returns the losses of several texts, each of documents cut into windows, in one pass over the weights."""

    def predict(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return predictions(decoder, *final_states(decoder, weights, ids, CHUNK_TOKENS, on_layer), ids)

    return _predicted(predict, texts)


@torch.inference_mode()
def _predicted(predict: Predict, texts: Mapping[str, Windows]) -> dict[str, Losses]:
    # All windows are rows of one batch: losses and likeliest tokens, (windows, longest - 1) each.
    ids = padded([window for documents in texts.values() for windows in documents for window in windows])
    return _gathered(texts, zip(*(values.numpy() for values in predict(torch.from_numpy(ids))), strict=True))


def _gathered(texts: Mapping[str, Windows], predicted: Iterator[tuple[np.ndarray, np.ndarray]]) -> dict[str, Losses]:
    """Returns the losses by text and document of windows that come in order; the padding is left out.

    predicted: losses and likeliest tokens of every window, (longest - 1,) each.
    """
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
