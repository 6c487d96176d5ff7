"""The last layers of a model as a model of its own, which reads what the layers before make of some samples.

So what changes the last layers only is computed without the others again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace

import torch

from edgeprune.model.attention import Tables
from edgeprune.model.forward import CHUNK_TOKENS, add_layer, embed, layer_weights
from edgeprune.model.model import Model


class _TailWeights(Mapping[str, torch.Tensor]):
    """The weights of the last layers by their new names; the embedding is the stream that enters them."""

    def __init__(self, model: Model, names: Collection[str], first: int, stream: torch.Tensor) -> None:
        self.model, self.names, self.first, self.stream = model, names, first, stream

    def __getitem__(self, name: str) -> torch.Tensor:
        if name == "embedding":
            return self.stream
        if name == "head" and self.model.decoder.tie_word_embeddings:
            return self.model.weights["embedding"]
        kind, _, rest = name.partition(".")
        if kind == "layers":
            index, _, rest = rest.partition(".")
            name = f"layers.{int(index) + self.first}.{rest}"
        return self.model.weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


@torch.inference_mode()
def tail_of(model: Model, first: int, ids: torch.Tensor) -> tuple[Model, torch.Tensor]:
    """Returns the layers from `first` on as a model, and the ids (b, t) int64 that it reads in place of the samples.

    ids: (b, t) int64, the samples; the stream behind the layers before is the embedding of the result, a row for each
    of their tokens, so that logits and prunings of it are those of the whole model. Raises NumericalError where
    activations are not finite.
    """
    decoder = model.decoder
    hidden, tables = embed(model, ids), Tables(decoder, ids.shape[1])  # (b, t, c)
    for index in range(first):
        add_layer(decoder, index, layer_weights(model, index), hidden, tables, CHUNK_TOKENS)
    stream = hidden.flatten(0, 1)  # (b * t, c)
    tail = replace(
        decoder,
        layers=decoder.layers[first:],
        vocab_size=len(stream),
        tie_word_embeddings=False,
        learned_positions=False,
        embedding_scale=1.0,
        picture=None,
    )
    weights = _TailWeights(model, tail.shapes(), first, stream)
    return replace(model, decoder=tail, weights=weights, quantised={}), torch.arange(len(stream)).view_as(ids)
