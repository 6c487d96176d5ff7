"""The Decoder in torch, one block at a time, on whole sequences: what calibration and evaluation run.

It holds one layer's weights at a time and knows nothing about pruning or engines.
Notation: b samples, t tokens, h query heads, k key/value heads, d head_dim, c hidden_size,
i intermediate_size. Everything is fp32, whatever the checkpoint stores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F

from edgeprune.errors import NumericalError
from edgeprune.model.decoder import Attention, Decoder
from edgeprune.model.model import Model

LayerWeights = dict[str, torch.Tensor]
WeightStream = Iterable[tuple[str, torch.Tensor]]
LOGIT_ROWS = 512  # positions whose logits are held at a time
CHUNK_TOKENS = 1024  # of one module's activations at a time: enough for full speed, small beside the moments


def layer_weights(model: Model, index: int) -> LayerWeights:
    """Weights of one layer in fp32, by the part of their name behind `layers.{index}.`."""
    prefix = f"layers.{index}."
    return {name.removeprefix(prefix): model.weights[name].float() for name in model.decoder.layer_shapes(index)}


def embed(model: Model, ids: torch.Tensor) -> torch.Tensor:
    """ids (b, t) int64 -> hidden states (b, t, c)."""
    return F.embedding(ids, model.weights["embedding"]).float()


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def rotary_tables(decoder: Decoder, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (t, d) of positions 0..length-1, both halves of the head alike."""
    frequencies = torch.tensor(decoder.rotary.inverse_frequencies, dtype=torch.float32)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos() * decoder.rotary.scaling, angles.sin() * decoder.rotary.scaling


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x (b, heads, t, d); pairs are (m, m + d/2)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def attention_context(
    x: torch.Tensor, weights: LayerWeights, attention: Attention, tables: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """Normed states (b, t, c) -> the input of the output projection (b, t, h * d), causal."""
    b, t, _ = x.shape
    d = attention.head_dim

    def heads(name: str) -> torch.Tensor:  # (b, heads, t, d)
        return F.linear(x, weights[f"attention.{name}"]).view(b, t, -1, d).transpose(1, 2)

    query, key = rotate(heads("q"), *tables), rotate(heads("k"), *tables)
    context = F.scaled_dot_product_attention(
        query, key, heads("v"), is_causal=True, enable_gqa=attention.heads_per_group > 1
    )
    return context.transpose(1, 2).reshape(b, t, attention.query_size)


def mlp_activation(x: torch.Tensor, weights: LayerWeights) -> torch.Tensor:
    """Normed states (b, t, c) -> the input of the down projection (b, t, i)."""
    return F.silu(F.linear(x, weights["mlp.gate"])) * F.linear(x, weights["mlp.up"])


def module_activation(
    decoder: Decoder,
    index: int,
    kind: str,
    weights: LayerWeights,
    hidden: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """The residual stream (b, t, c) -> the input of the module's output projection (b, t, features)."""
    x = rms_norm(hidden, weights[f"{kind}.norm"], decoder.norm_eps)
    if kind == "mlp":
        return mlp_activation(x, weights)
    return attention_context(x, weights, decoder.layers[index].attention, tables)


def module_inputs(
    decoder: Decoder,
    index: int,
    kind: str,
    weights: LayerWeights,
    hidden: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor],
    chunk: int = CHUNK_TOKENS,
) -> torch.Tensor:
    """Inputs of one module's output projection on all samples, computed about `chunk` tokens at a time.

    kind: `attention` (input of o) or `mlp` (input of down). Returns (b, t, features).
    Raises NumericalError naming the layer if a value is not finite.
    """
    inputs = torch.empty(*hidden.shape[:2], weights[OUTPUT[kind]].shape[1])
    for part, states in zip(row_chunks(inputs, chunk), row_chunks(hidden, chunk), strict=True):
        part.copy_(module_activation(decoder, index, kind, weights, states, tables))
        if not torch.isfinite(part).all():
            raise NumericalError(
                f"the activations of layer {index} ({kind}) are not finite on the given samples",
                "Check the checkpoint's weights (NaN or infinity), or leave out the sample that causes it.",
            )
    return inputs


def row_chunks(states: torch.Tensor, tokens: int) -> tuple[torch.Tensor, ...]:
    """Views of whole samples of states (b, t, ...) with about so many tokens each, at least one sample."""
    return states.split(max(1, tokens // states.shape[1]))


OUTPUT = {"attention": "attention.o", "mlp": "mlp.down"}
"""The output projection of each kind of module: the one matrix that compensation changes."""

BIAS = {kind: f"{name}_bias" for kind, name in OUTPUT.items()}


def modules_of(decoder: Decoder, index: int) -> list[str]:
    """The kinds of modules that a layer has, in the order in which they run."""
    layer = decoder.layers[index]
    return [kind for kind, part in (("attention", layer.attention), ("mlp", layer.mlp)) if part is not None]


def add_module(
    decoder: Decoder,
    index: int,
    kind: str,
    weights: LayerWeights,
    hidden: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor],
    chunk: int = CHUNK_TOKENS,
) -> None:
    """hidden (b, t, c) += the module's output, about `chunk` tokens at a time. Raises NumericalError."""
    for part in row_chunks(hidden, chunk):
        inputs = module_inputs(decoder, index, kind, weights, part, tables, chunk)
        part += F.linear(inputs, weights[OUTPUT[kind]], weights.get(BIAS[kind]))


def weight_stream(model: Model) -> WeightStream:
    """All weights of a model in order, each read when it is asked for."""
    return ((name, model.weights[name]) for name in model.decoder.shapes())


@torch.inference_mode()
def token_losses(
    decoder: Decoder, weights: WeightStream, ids: torch.Tensor, chunk: int = CHUNK_TOKENS,
    on_layer: Callable[[], None] = lambda: None,
) -> torch.Tensor:  # fmt: skip
    """Negative log-likelihood in nats (b, t - 1) fp64 of every token of ids (b, t) but the first.

    weights: in the order of decoder.shapes(), consumed as they come, so that a model is evaluated
    while it is read, or while it is pruned; one layer is held at a time, and the embedding where the
    head is tied to it.
    """
    logits, labels = _logit_chunks(decoder, weights, ids, chunk, on_layer), ids[:, 1:].flatten().split(LOGIT_ROWS)
    losses = [_losses_of(part, wanted) for part, wanted in zip(logits, labels, strict=True)]
    return torch.cat(losses).view(len(ids), -1)


@torch.inference_mode()
def token_predictions(
    decoder: Decoder, weights: WeightStream, ids: torch.Tensor, chunk: int = CHUNK_TOKENS,
    on_layer: Callable[[], None] = lambda: None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """token_losses, and the likeliest token (b, t - 1) int64 in the place of each, from the same pass."""
    labels = ids[:, 1:].flatten().split(LOGIT_ROWS)
    losses, likeliest = [], []
    for part, wanted in zip(_logit_chunks(decoder, weights, ids, chunk, on_layer), labels, strict=True):
        losses.append(_losses_of(part, wanted))
        likeliest.append(part.argmax(dim=-1))
    return torch.cat(losses).view(len(ids), -1), torch.cat(likeliest).view(len(ids), -1)


def _losses_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, labels, reduction="none").double()


def _logit_chunks(
    decoder: Decoder, weights: WeightStream, ids: torch.Tensor, chunk: int, on_layer: Callable[[], None]
) -> Iterator[torch.Tensor]:
    """Logits (up to LOGIT_ROWS, vocabulary) fp32 at every position but the last of each row, rows in order."""
    stream = iter(weights)

    def take(name: str) -> torch.Tensor:
        given, tensor = next(stream)
        if given != name:
            raise ValueError(f"expected {name}, got {given}")
        return tensor

    head = take("embedding")
    hidden = F.embedding(ids, head).float()
    tables = rotary_tables(decoder, ids.shape[1])
    for index in range(len(decoder.layers)):
        prefix = f"layers.{index}."
        layer = {name.removeprefix(prefix): take(name).float() for name in decoder.layer_shapes(index)}
        for kind in modules_of(decoder, index):
            add_module(decoder, index, kind, layer, hidden, tables, chunk)
        on_layer()
    states = rms_norm(hidden[:, :-1], take("norm").float(), decoder.norm_eps).flatten(0, 1)
    if not decoder.tie_word_embeddings:
        head = take("head")
    head = head.float()
    for part in states.split(LOGIT_ROWS):
        yield F.linear(part, head)
