"""The Decoder's forward pass in torch, a module at a time on whole sequences, for calibration and evaluation.

It holds the weights of one layer at a time and knows nothing about pruning or engines. Everything is fp32, whatever
the checkpoint stores. Notation: b samples, t tokens, h query heads, k key/value heads, d head_dim, c hidden_size,
i intermediate_size, n tokens of all samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
import torch.nn.functional as F

from edgeprune.errors import NumericalError
from edgeprune.model.attention import LayerWeights, Tables, attention_context
from edgeprune.model.decoder import Decoder
from edgeprune.model.mlp import experts_output, mlp_activation
from edgeprune.model.model import Model
from edgeprune.model.quantised import QuantisedWeight, as_float, input_scale_of, rounded_inputs, values_by_name

WeightStream = Iterable[tuple[str, torch.Tensor | QuantisedWeight]]
LOGIT_ROWS = 512  # positions whose logits are in memory at a time
CHUNK_TOKENS = 1024  # that a module computes at a time: enough for full speed, little memory beside the moments


def layer_weights(model: Model, index: int, kind: str = "") -> LayerWeights:
    """Returns the weights of one layer in fp32, by the rest of their name after `layers.{index}.`.

    kind: of the only module whose weights are read, `attention` or `mlp`.
    """
    prefix = f"layers.{index}."
    names = [name for name in model.decoder.layer_shapes(index) if name.startswith(prefix + kind)]
    return {name.removeprefix(prefix): model.weights[name].float() for name in names}


def embed(model: Model, ids: torch.Tensor) -> torch.Tensor:
    """Returns the hidden states (b, t, c) fp32 of ids (b, t) int64, which begin at position 0."""
    positions = model.weights["positions"] if model.decoder.learned_positions else None
    return embedded(model.decoder, ids, model.weights["embedding"], positions)


def embedded(
    decoder: Decoder, ids: torch.Tensor, embedding: torch.Tensor | QuantisedWeight, positions: torch.Tensor | None
) -> torch.Tensor:
    """Returns the hidden states (b, t, c) fp32 of ids (b, t) int64, which begin at position 0.

    embedding: (input_vocab_size, c); positions: (max_position_embeddings, c), or None where the model has no such
    table.
    """
    if isinstance(embedding, QuantisedWeight):
        hidden = embedding.rows(ids.flatten()).dequantised().view(*ids.shape, -1)  # (b, t, c)
    else:
        hidden = F.embedding(ids, embedding).float()  # (b, t, c)
    if decoder.embedding_scale != 1.0:
        hidden *= decoder.embedding_scale
    if positions is not None:
        hidden += positions[: ids.shape[1]].float()
    return hidden


def normed(decoder: Decoder, x: torch.Tensor, weights: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """Returns x (..., c) after a norm of the residual stream or of a module's output.

    name: the norm's weight in `weights`.
    """
    if decoder.norm == "layer":
        return F.layer_norm(x, (x.shape[-1],), weights[name], weights[f"{name}_bias"], decoder.norm_eps)
    return F.rms_norm(x, (x.shape[-1],), weights[name], decoder.norm_eps)


def module_states(decoder: Decoder, kind: str, weights: LayerWeights, hidden: torch.Tensor) -> torch.Tensor:
    """Returns what a module reads of the residual stream hidden (b, t, c): its norm.

    In models that norm only the outputs of modules it is the stream itself.
    """
    return hidden if decoder.norms == "after" else normed(decoder, hidden, weights, f"{kind}.norm")


def module_activation(
    decoder: Decoder, index: int, kind: str, weights: LayerWeights, hidden: torch.Tensor, tables: Tables
) -> torch.Tensor:
    """Returns the input (b, t, features) of a module's output projection for the residual stream hidden (b, t, c).

    kind: `attention` or `mlp`. A mixture of experts has one such projection for each expert: see `experts_output`.
    """
    layer = decoder.layers[index]
    first = f"mlp.{layer.mlp.inputs[0]}" if kind == "mlp" else "attention.q"
    form, scale = getattr(layer, kind).weight_format, weights.get(input_scale_of(first))
    x = rounded_inputs(module_states(decoder, kind, weights, hidden), scale, form)
    if kind == "mlp":
        return mlp_activation(x, weights, layer.mlp)
    return attention_context(x, weights, layer.attention, tables, decoder.norm_eps)


def module_raw(
    decoder: Decoder, index: int, kind: str, weights: LayerWeights, hidden: torch.Tensor, tables: Tables
) -> torch.Tensor:
    """Returns the output (b, t, c) of a module's output projection, before any norm.

    hidden: the residual stream (b, t, c).
    """
    if has_experts(decoder, index, kind):
        return experts_output(module_states(decoder, kind, weights, hidden), weights, decoder.layers[index].mlp)
    inputs = module_activation(decoder, index, kind, weights, hidden, tables)
    form = getattr(decoder.layers[index], kind).weight_format
    inputs = rounded_inputs(inputs, weights.get(input_scale_of(OUTPUT[kind])), form)
    return F.linear(inputs, weights[OUTPUT[kind]], weights.get(BIAS[kind]))


def has_experts(decoder: Decoder, index: int, kind: str) -> bool:
    """Returns whether a module is a mixture of experts."""
    mlp = decoder.layers[index].mlp
    return kind == "mlp" and mlp is not None and mlp.experts is not None


def module_output(decoder: Decoder, kind: str, weights: LayerWeights, raw: torch.Tensor) -> torch.Tensor:
    """Returns what is added to the residual stream (b, t, c) for the output raw (b, t, c) of the output projection."""
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
    """Returns the inputs (b, t, features) of one module's output projection on all samples.

    kind: `attention` (input of o) or `mlp` (input of down). About `chunk` tokens are computed at a time.
    Raises NumericalError naming the layer if a value is not finite.
    """
    inputs = torch.empty(*hidden.shape[:2], weights[OUTPUT[kind]].shape[1])
    for inputs_part, hidden_part in zip(row_chunks(inputs, chunk), row_chunks(hidden, chunk), strict=True):
        inputs_part.copy_(module_activation(decoder, index, kind, weights, hidden_part, tables))
        check_finite(inputs_part, index, kind)
    return inputs


def check_finite(states: torch.Tensor, index: int, kind: str) -> None:
    """Raises NumericalError naming the module if a value of its states is not finite."""
    # A sum is finite where all values are, but for an overflow; it takes no memory.
    if not torch.isfinite(states.sum()) and not torch.isfinite(states).all():
        raise NumericalError(
            f"the activations of layer {index} ({kind}) are not finite on the given samples",
            "Check the checkpoint's weights (NaN or infinity), or leave out the sample that causes it.",
        )


def row_chunks(states: torch.Tensor, tokens: int) -> tuple[torch.Tensor, ...]:
    """Returns views of states (b, t, ...): whole samples of about so many tokens each, one sample at least."""
    return states.split(max(1, tokens // states.shape[1]))


OUTPUT = {"attention": "attention.o", "mlp": "mlp.down"}
"""The output projections by kind of module: compensation changes these matrices alone."""

BIAS = {kind: f"{name}_bias" for kind, name in OUTPUT.items()}


def modules_of(decoder: Decoder, index: int) -> list[str]:
    """Returns the kinds of modules that a layer has, in the order in which they run."""
    layer = decoder.layers[index]
    return [kind for kind, module in (("attention", layer.attention), ("mlp", layer.mlp)) if module is not None]


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
    """Adds a module's output to hidden (b, t, c) in place, about `chunk` tokens at a time. Raises NumericalError.

    source: (b, t, c), the states that the module reads where they differ from those it is added to (see `entering`).
    """
    source_states = hidden if source is None else source
    for hidden_part, source_part in zip(row_chunks(hidden, chunk), row_chunks(source_states, chunk), strict=True):
        raw = module_raw(decoder, index, kind, weights, source_part, tables)
        check_finite(raw, index, kind)
        hidden_part += module_output(decoder, kind, weights, raw)


def entering(decoder: Decoder, hidden: torch.Tensor) -> torch.Tensor:
    """Returns the states (b, t, c) that the modules of a layer read.

    Where the modules run in parallel it is a copy of the stream as it enters the layer, otherwise the stream itself, to
    which each module adds in place.
    """
    return hidden.clone() if decoder.parallel else hidden


def add_layer(
    decoder: Decoder, index: int, weights: LayerWeights, hidden: torch.Tensor, tables: Tables, chunk: int = CHUNK_TOKENS
) -> None:
    """Adds the outputs of a layer's modules to hidden (b, t, c) in place. Raises NumericalError."""
    for hidden_part in row_chunks(hidden, chunk):
        source = entering(decoder, hidden_part)
        for kind in modules_of(decoder, index):
            add_module(decoder, index, kind, weights, hidden_part, tables, chunk, source)


def head_logits(decoder: Decoder, states: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """Returns the logits (n, vocab_size) of normed states (n, c). head: (vocab_size, c)."""
    logits = F.linear(states, head)
    if decoder.logits_scale != 1.0:
        logits = logits * decoder.logits_scale
    if decoder.logits_softcap is not None:
        logits = decoder.logits_softcap * torch.tanh(logits / decoder.logits_softcap)
    return logits


def weight_stream(model: Model) -> WeightStream:
    """Returns all weights of a model in the order of decoder.shapes(), each read when it is asked for."""
    return ((name, model.stored[name]) for name in model.decoder.shapes())


@torch.inference_mode()
def token_losses(
    decoder: Decoder,
    weights: WeightStream,
    ids: torch.Tensor,
    chunk: int = CHUNK_TOKENS,
    on_layer: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """Returns the negative log-likelihood in nats, (b, t - 1) fp64, of every token of ids (b, t) but the first.

    weights: in the order of decoder.shapes(), consumed as they come, so that a model can be evaluated while it is read
    or pruned; one layer is in memory at a time and, where the head is tied to it, the embedding.
    """
    logits, labels = _logit_chunks(decoder, weights, ids, chunk, on_layer), ids[:, 1:].flatten().split(LOGIT_ROWS)
    losses = [_losses_of(chunk_logits, chunk_labels) for chunk_logits, chunk_labels in zip(logits, labels, strict=True)]
    return torch.cat(losses).view(len(ids), -1)


@torch.inference_mode()
def predictions(
    decoder: Decoder, states: torch.Tensor, head: torch.Tensor, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the losses as of `token_losses` and the likeliest tokens, (b, t - 1) int64, of what `final_states` gives.

    ids: (b, t) int64.
    """
    losses, likeliest = [], []
    labels = ids[:, 1:].flatten().split(LOGIT_ROWS)
    for chunk_states, chunk_labels in zip(states.split(LOGIT_ROWS), labels, strict=True):
        logits = head_logits(decoder, chunk_states, head)
        losses.append(_losses_of(logits, chunk_labels))
        likeliest.append(logits.argmax(dim=-1))
    return torch.cat(losses).view(len(ids), -1), torch.cat(likeliest).view(len(ids), -1)


@torch.inference_mode()
def spread_logits(decoder: Decoder, weights: WeightStream, ids: torch.Tensor, count: int) -> torch.Tensor:
    """Returns the logits (positions, vocab_size) fp32 at about `count` evenly spread positions of ids (b, t) int64."""
    states, head = final_states(decoder, weights, ids, CHUNK_TOKENS, lambda: None)
    return head_logits(decoder, states[:: max(1, len(states) // count)][:count], head)


@torch.inference_mode()
def token_logits(decoder: Decoder, weights: WeightStream, ids: torch.Tensor) -> torch.Tensor:
    """Returns the logits (b, t - 1, vocab_size) fp32 at every position but the last of ids (b, t) int64."""
    chunks = list(_logit_chunks(decoder, weights, ids, CHUNK_TOKENS, lambda: None))
    return torch.cat(chunks).view(len(ids), -1, decoder.vocab_size)


def _losses_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Returns the losses (n,) fp64 of labels (n,) int64 by logits (n, vocab_size)."""
    return F.cross_entropy(logits, labels, reduction="none").double()


def _logit_chunks(
    decoder: Decoder, weights: WeightStream, ids: torch.Tensor, chunk: int, on_layer: Callable[[], None]
) -> Iterator[torch.Tensor]:
    """Yields logits (up to LOGIT_ROWS, vocab_size) fp32 at every position but the last of each sample, in order."""
    states, head = final_states(decoder, weights, ids, chunk, on_layer)
    for chunk_states in states.split(LOGIT_ROWS):
        yield head_logits(decoder, chunk_states, head)


def final_states(
    decoder: Decoder, weights: WeightStream, ids: torch.Tensor, chunk: int, on_layer: Callable[[], None]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns what the head reads at every position but the last of each sample, (b * (t - 1), c), and the head.

    The last token is never fed: that of a picture has no position in some models. Raises ValueError for a weight that
    does not come in the order of decoder.shapes().
    """
    stream = iter(weights)

    def take(name: str) -> torch.Tensor | QuantisedWeight:
        """Returns the next weight. Raises ValueError where it has another name."""
        next_name, weight = next(stream)
        if next_name != name:
            raise ValueError(f"expected {name}, got {next_name}")
        return weight

    # Embed; a tied head needs the embedding again at the end.
    head, ids = take("embedding"), ids[:, :-1]
    hidden = embedded(decoder, ids, head, take("positions") if decoder.learned_positions else None)  # (b, t - 1, c)
    # Run one layer at a time.
    tables = Tables(decoder, ids.shape[1])
    for index in range(len(decoder.layers)):
        prefix = f"layers.{index}."
        weights_of_layer = values_by_name(
            (name.removeprefix(prefix), take(name)) for name in decoder.layer_shapes(index)
        )
        add_layer(decoder, index, weights_of_layer, hidden, tables, chunk)
        on_layer()
    # Norm the states.
    norm = {name: as_float(take(name)) for name in decoder.norm_shapes("norm")}
    states = normed(decoder, hidden, norm, "norm").flatten(0, 1)  # (b * (t - 1), c)
    if not decoder.tie_word_embeddings:
        head = take("head")
    return states, as_float(head)
