"""The Decoder in torch, one block at a time, on whole sequences: what calibration and evaluation run.

It holds one layer's weights at a time and knows nothing about pruning or engines.
Notation: b samples, t tokens, h query heads, k key/value heads, d head_dim, c hidden_size,
i intermediate_size. Everything is fp32, whatever the checkpoint stores.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
import torch.nn.functional as F

from edgeprune.errors import NumericalError
from edgeprune.model.decoder import Attention, Decoder, Experts, Mlp, Rotary
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
    positions = model.weights["positions"] if model.decoder.learned_positions else None
    return embedded(model.decoder, ids, model.weights["embedding"], positions)


def embedded(
    decoder: Decoder, ids: torch.Tensor, embedding: torch.Tensor, positions: torch.Tensor | None
) -> torch.Tensor:
    """ids (b, t) int64 -> hidden states (b, t, c) of sequences from position 0."""
    hidden = F.embedding(ids, embedding).float()
    if decoder.embedding_scale != 1.0:
        hidden *= decoder.embedding_scale
    if positions is not None:
        hidden += positions[: ids.shape[1]].float()
    return hidden


def normed(decoder: Decoder, x: torch.Tensor, weights: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """The decoder's norm of the residual stream or of a module's output (b, t, c), by its weights' name."""
    if decoder.norm == "layer":
        return F.layer_norm(x, (x.shape[-1],), weights[name], weights[f"{name}_bias"], decoder.norm_eps)
    return F.rms_norm(x, (x.shape[-1],), weights[name], decoder.norm_eps)


class Tables:
    """cos and sin (t, turned) of positions 0..t-1 by rotary embedding, both halves alike; and the windows' masks."""

    def __init__(self, decoder: Decoder, length: int) -> None:
        self.rotary = {rotary: _rotary_table(rotary, length) for rotary in decoder.rotaries}
        self.masks = {window: _mask(window, length) for window in decoder.windows}


def _rotary_table(rotary: Rotary, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    frequencies = torch.tensor(rotary.inverse_frequencies, dtype=torch.float32)
    positions, grid = torch.arange(length, dtype=torch.float32), rotary.grid
    if grid is None:
        angles = torch.outer(positions, frequencies)
    else:
        places = (positions - grid.prefix).clamp_min(0)
        by_row, by_column = frequencies.chunk(2)
        angles = torch.cat(
            [
                torch.outer(places.div(grid.side, rounding_mode="floor"), by_row),
                torch.outer(places % grid.side, by_column),
            ],
            dim=-1,
        )
    angles = torch.cat([angles, angles], dim=-1)
    cos, sin = angles.cos() * rotary.scaling, angles.sin() * rotary.scaling
    if grid is not None:
        cos[: grid.prefix] = sin[: grid.prefix] = 0.0
    return cos, sin


def _mask(window: int | None, length: int) -> torch.Tensor | None:
    """(t, t) bool, which keys a query sees; None where it sees all before it."""
    if window is None or window >= length:
        return None
    distance = torch.arange(length)[:, None] - torch.arange(length)
    return (distance >= 0) & (distance < window)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x (b, heads, t, d); pairs are (m, m + turned / 2), dimensions behind those that turn stay."""
    turned = cos.shape[-1]
    if turned < x.shape[-1]:
        return torch.cat([rotate(x[..., :turned], cos, sin), x[..., turned:]], dim=-1)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def attention_heads(
    x: torch.Tensor, weights: LayerWeights, attention: Attention, tables: Tables, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normed states (b, t, c) -> queries (b, h, t, d), keys and values (b, k, t, d), normed and turned as they are."""
    b, t, _ = x.shape

    def heads(name: str) -> torch.Tensor:  # (b, heads, t, d)
        projected = F.linear(x, weights[f"attention.{name}"], weights.get(f"attention.{name}_bias"))
        if attention.qk_norm == "all" and name != "v":
            projected = F.rms_norm(projected, projected.shape[-1:], weights[f"attention.{name}_norm"], eps)
        split = projected.view(b, t, -1, attention.head_dim).transpose(1, 2)
        if attention.qk_norm == "head" and name != "v":
            split = F.rms_norm(split, split.shape[-1:], weights[f"attention.{name}_norm"], eps)
        return split

    query, key = heads("q"), heads("k")
    if attention.rotary is not None:
        cos, sin = tables.rotary[attention.rotary]
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    return query, key, heads("v")


def attention_context(
    x: torch.Tensor, weights: LayerWeights, attention: Attention, tables: Tables, eps: float
) -> torch.Tensor:
    """Normed states (b, t, c) -> the input of the output projection (b, t, h * d), causal."""
    return attend(*attention_heads(x, weights, attention, tables, eps), attention, tables.masks[attention.window])


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention: Attention, mask: torch.Tensor | None
) -> torch.Tensor:
    """Heads as from `attention_heads` -> what queries see of the values (b, t, h * d), causal within the mask."""
    context = _attended(query, key, value, attention, mask)
    return context.transpose(1, 2).reshape(len(context), -1, attention.query_size)


def _attended(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention: Attention, mask: torch.Tensor | None
) -> torch.Tensor:
    shared = attention.heads_per_group > 1
    if attention.softcap is None:
        return F.scaled_dot_product_attention(
            query, key, value, mask, is_causal=mask is None, scale=attention.score_scale, enable_gqa=shared
        )
    if shared:
        key, value = (part.repeat_interleave(attention.heads_per_group, dim=1) for part in (key, value))
    scores = attention.softcap * torch.tanh(query @ key.mT * (attention.score_scale / attention.softcap))
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    return scores.masked_fill(~mask, -torch.inf).softmax(dim=-1) @ value


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "gelu_quick": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
}


def mlp_activation(x: torch.Tensor, weights: LayerWeights, mlp: Mlp, prefix: str = "mlp.") -> torch.Tensor:
    """Normed states (..., c) -> the input of the down projection (..., i)."""
    parts = [F.linear(x, weights[prefix + name], weights.get(f"{prefix}{name}_bias")) for name in mlp.inputs]
    activated = ACTIVATIONS[mlp.activation](parts[0])
    return activated * parts[1] if mlp.gated else activated


def routed(x: torch.Tensor, weights: LayerWeights, experts: Experts) -> tuple[torch.Tensor, torch.Tensor]:
    """Normed states (n, c) -> each token's experts (n, num_experts_per_tok) int64, and their weights fp32."""
    shares, chosen = F.linear(x, weights["mlp.router"]).softmax(dim=-1).topk(experts.num_experts_per_tok, dim=-1)
    return chosen, shares / shares.sum(dim=-1, keepdim=True) if experts.normalised else shares


def expert_tokens(chosen: torch.Tensor, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the tokens that take an expert: their numbers, and in which of their places it stands."""
    return torch.where(chosen == expert)


def experts_output(x: torch.Tensor, weights: LayerWeights, mlp: Mlp) -> torch.Tensor:
    """Normed states (b, t, c) -> the weighted sum (b, t, c) of each token's experts."""
    flat = x.flatten(0, 1)
    chosen, shares = routed(flat, weights, mlp.experts)
    output = torch.zeros_like(flat)
    for expert in range(mlp.experts.num_experts):
        tokens, places = expert_tokens(chosen, expert)
        if len(tokens):
            prefix = f"mlp.experts.{expert}."
            inner = mlp_activation(flat[tokens], weights, mlp, prefix)
            found = F.linear(inner, weights[prefix + "down"]) * shares[tokens, places, None]
            output = output.index_add(0, tokens, found)
    return output.view_as(x)


def module_states(decoder: Decoder, kind: str, weights: LayerWeights, hidden: torch.Tensor) -> torch.Tensor:
    """The residual stream (b, t, c) as a module sees it: normed, but in models that norm outputs only."""
    return hidden if decoder.norms == "after" else normed(decoder, hidden, weights, f"{kind}.norm")


def module_activation(
    decoder: Decoder, index: int, kind: str, weights: LayerWeights, hidden: torch.Tensor, tables: Tables
) -> torch.Tensor:
    """The residual stream (b, t, c) -> the input of the module's output projection (b, t, features).

    A mixture of experts has one such projection for each: see `experts_output`.
    """
    x, layer = module_states(decoder, kind, weights, hidden), decoder.layers[index]
    if kind == "mlp":
        return mlp_activation(x, weights, layer.mlp)
    return attention_context(x, weights, layer.attention, tables, decoder.norm_eps)


def module_raw(
    decoder: Decoder, index: int, kind: str, weights: LayerWeights, hidden: torch.Tensor, tables: Tables
) -> torch.Tensor:
    """The residual stream (b, t, c) -> what the module's output projection gives (b, t, c), before any norm."""
    if has_experts(decoder, index, kind):
        return experts_output(module_states(decoder, kind, weights, hidden), weights, decoder.layers[index].mlp)
    inputs = module_activation(decoder, index, kind, weights, hidden, tables)
    return F.linear(inputs, weights[OUTPUT[kind]], weights.get(BIAS[kind]))


def has_experts(decoder: Decoder, index: int, kind: str) -> bool:
    mlp = decoder.layers[index].mlp
    return kind == "mlp" and mlp is not None and mlp.experts is not None


def module_output(decoder: Decoder, kind: str, weights: LayerWeights, raw: torch.Tensor) -> torch.Tensor:
    """What the output projection gives (b, t, c) -> what is added to the residual stream."""
    return raw if decoder.norms == "before" else normed(decoder, raw, weights, f"{kind}.post_norm")


def module_inputs(
    decoder: Decoder,
    index: int,
    kind: str,
    weights: LayerWeights,
    hidden: torch.Tensor,
    tables: Tables,
    chunk: int = CHUNK_TOKENS,
) -> torch.Tensor:
    """Inputs of one module's output projection on all samples, computed about `chunk` tokens at a time.

    kind: `attention` (input of o) or `mlp` (input of down). Returns (b, t, features).
    Raises NumericalError naming the layer if a value is not finite.
    """
    inputs = torch.empty(*hidden.shape[:2], weights[OUTPUT[kind]].shape[1])
    for part, states in zip(row_chunks(inputs, chunk), row_chunks(hidden, chunk), strict=True):
        part.copy_(module_activation(decoder, index, kind, weights, states, tables))
        check_finite(part, index, kind)
    return inputs


def check_finite(states: torch.Tensor, index: int, kind: str) -> None:
    """Raises NumericalError naming the module."""
    if not torch.isfinite(states).all():
        raise NumericalError(
            f"the activations of layer {index} ({kind}) are not finite on the given samples",
            "Check the checkpoint's weights (NaN or infinity), or leave out the sample that causes it.",
        )


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
    tables: Tables,
    chunk: int = CHUNK_TOKENS,
    source: torch.Tensor | None = None,
) -> None:
    """hidden (b, t, c) += the module's output, about `chunk` tokens at a time. Raises NumericalError.

    source: the states that the module reads, where they are others than those it is added to (see `entering`).
    """
    read = hidden if source is None else source
    for part, states in zip(row_chunks(hidden, chunk), row_chunks(read, chunk), strict=True):
        raw = module_raw(decoder, index, kind, weights, states, tables)
        check_finite(raw, index, kind)
        part += module_output(decoder, kind, weights, raw)


def entering(decoder: Decoder, hidden: torch.Tensor) -> torch.Tensor:
    """What the modules of a layer read: where they run in parallel the stream as it enters, else the stream itself,
    to which each module adds in place."""
    return hidden.clone() if decoder.parallel else hidden


def add_layer(
    decoder: Decoder, index: int, weights: LayerWeights, hidden: torch.Tensor, tables: Tables, chunk: int = CHUNK_TOKENS
) -> None:
    """hidden (b, t, c) += all that the layer adds. Raises NumericalError."""
    for part in row_chunks(hidden, chunk):
        source = entering(decoder, part)
        for kind in modules_of(decoder, index):
            add_module(decoder, index, kind, weights, part, tables, chunk, source)


def head_logits(decoder: Decoder, states: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """Normed states (n, c) -> logits (n, vocabulary)."""
    logits = F.linear(states, head)
    if decoder.logits_scale != 1.0:
        logits = logits * decoder.logits_scale
    if decoder.logits_softcap is not None:
        logits = decoder.logits_softcap * torch.tanh(logits / decoder.logits_softcap)
    return logits


def weight_stream(model: Model) -> WeightStream:
    """All weights of a model in order, each read when it is asked for."""
    return ((name, model.weights[name]) for name in model.decoder.shapes())


@torch.inference_mode()
def token_losses(
    decoder: Decoder,
    weights: WeightStream,
    ids: torch.Tensor,
    chunk: int = CHUNK_TOKENS,
    on_layer: Callable[[], None] = lambda: None,
) -> torch.Tensor:
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
    decoder: Decoder,
    weights: WeightStream,
    ids: torch.Tensor,
    chunk: int = CHUNK_TOKENS,
    on_layer: Callable[[], None] = lambda: None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """token_losses, and the likeliest token (b, t - 1) int64 in the place of each, from the same pass."""
    labels = ids[:, 1:].flatten().split(LOGIT_ROWS)
    losses, likeliest = [], []
    for part, wanted in zip(_logit_chunks(decoder, weights, ids, chunk, on_layer), labels, strict=True):
        losses.append(_losses_of(part, wanted))
        likeliest.append(part.argmax(dim=-1))
    return torch.cat(losses).view(len(ids), -1), torch.cat(likeliest).view(len(ids), -1)


@torch.inference_mode()
def token_logits(decoder: Decoder, weights: WeightStream, ids: torch.Tensor) -> torch.Tensor:
    """Logits (b, t - 1, vocabulary) fp32 at every position but the last of ids (b, t) int64."""
    parts = list(_logit_chunks(decoder, weights, ids, CHUNK_TOKENS, lambda: None))
    return torch.cat(parts).view(len(ids), -1, decoder.vocab_size)


def _losses_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, labels, reduction="none").double()


def _logit_chunks(
    decoder: Decoder, weights: WeightStream, ids: torch.Tensor, chunk: int, on_layer: Callable[[], None]
) -> Iterator[torch.Tensor]:
    """Logits (up to LOGIT_ROWS, vocabulary) fp32 at every position but the last of each row, rows in order.

    The last token is never fed: a picture's has no position in some models.
    """
    stream = iter(weights)

    def take(name: str) -> torch.Tensor:
        given, tensor = next(stream)
        if given != name:
            raise ValueError(f"expected {name}, got {given}")
        return tensor

    head, ids = take("embedding"), ids[:, :-1]
    hidden = embedded(decoder, ids, head, take("positions") if decoder.learned_positions else None)
    tables = Tables(decoder, ids.shape[1])
    for index in range(len(decoder.layers)):
        prefix = f"layers.{index}."
        layer = {name.removeprefix(prefix): take(name).float() for name in decoder.layer_shapes(index)}
        add_layer(decoder, index, layer, hidden, tables, chunk)
        on_layer()
    norm = {name: take(name).float() for name in decoder.norm_shapes("norm")}
    states = normed(decoder, hidden, norm, "norm").flatten(0, 1)
    if not decoder.tie_word_embeddings:
        head = take("head")
    head = head.float()
    for part in states.split(LOGIT_ROWS):
        yield head_logits(decoder, part, head)
