"""Whether fp16 holds what a model computes: the largest values on given samples, found before an engine is built.

The walk is in fp32, so that it goes on where fp16 would not. It looks at every tensor that the fp16 graph writes
(engine/graph_ops.py, engine/graph_attention.py), but for those that another one bounds, and for those within gelu,
whose infinity tanh or sigmoid takes to the right 1 or 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from edgeprune.errors import NumericalError

if TYPE_CHECKING:
    import torch

    from edgeprune.model.decoder import Attention, Mlp
    from edgeprune.model.forward import LayerWeights, Tables
    from edgeprune.model.model import Model

LIMIT = 65504.0  # the largest number of fp16
CLOSE = 0.5  # share of it from which a model is said to be near


@dataclass(frozen=True)
class Peak:
    """The largest absolute value of a tensor. place: `layer 7 mlp`, `embedding` or `head`."""

    place: str
    tensor: str
    value: float

    def __str__(self) -> str:
        return f"{self.place}: {self.tensor} reaches {self.value:.3g} on the calibration samples, fp16 holds {LIMIT:g}"


def check_fp16(peaks: Iterator[Peak], remedy: str) -> Peak:
    """The largest of the peaks. Raises NumericalError at the first that fp16 does not hold."""
    largest = Peak("", "", 0.0)
    for peak in peaks:
        if not peak.value <= LIMIT:
            raise NumericalError(str(peak), remedy)
        largest = max(largest, peak, key=lambda one: one.value)
    return largest


def activation_peaks(model: Model, ids: torch.Tensor, on_layer: Callable[[], None] = lambda: None) -> Iterator[Peak]:
    """Peaks of a model on ids (samples, tokens) int64 as the walk comes to them: it ends where its reader does.

    One layer's weights and the samples' hidden states are held. Raises NumericalError naming the layer where values
    are not finite in fp32 either.
    """
    import torch

    from edgeprune.model.forward import CHUNK_TOKENS, Tables, embed, layer_weights, row_chunks

    decoder = model.decoder
    tables = Tables(decoder, ids.shape[1])
    hidden = embed(model, ids)
    yield Peak("embedding", "its output", _largest(hidden))
    for index in range(len(decoder.layers)):
        weights, seen = layer_weights(model, index), _Seen()
        with torch.inference_mode():
            for part in row_chunks(hidden, CHUNK_TOKENS):
                part.copy_(_behind_layer(model, index, weights, part, tables, seen))
        yield from (Peak(f"layer {index} {kind}", tensor, value) for (kind, tensor), value in seen.values.items())
        on_layer()
    with torch.inference_mode():
        seen = _Seen()
        _look_at_head(model, hidden.flatten(0, 1), seen)
    yield from (Peak(kind, tensor, value) for (kind, tensor), value in seen.values.items())


def _largest(tensor: torch.Tensor) -> float:
    low, high = tensor.aminmax()
    return max(-float(low), float(high))


@dataclass
class _Seen:
    """The largest absolute value of every tensor, by the module and its own name, over all chunks."""

    values: dict[tuple[str, str], float] = field(default_factory=dict)

    def __call__(self, kind: str, name: str, tensor: torch.Tensor) -> torch.Tensor:
        self.values[kind, name] = max(_largest(tensor), self.values.get((kind, name), 0.0))
        return tensor


def _behind_layer(
    model: Model, index: int, weights: LayerWeights, hidden: torch.Tensor, tables: Tables, seen: _Seen
) -> torch.Tensor:
    """The residual stream (b, t, c) before a layer -> behind it."""
    import torch

    from edgeprune.model.forward import check_finite, module_output, module_states, modules_of

    decoder = model.decoder
    added = torch.zeros_like(hidden)  # and not yet in the stream, where the modules run in parallel
    for kind in modules_of(decoder, index):
        x = module_states(decoder, kind, weights, hidden)
        if decoder.norms != "after":
            seen(kind, "norm", x)
        if kind == "attention":
            raw = _attention(x, weights, decoder.layers[index].attention, tables, decoder.norm_eps, seen)
        else:
            raw = _mlp(x, weights, decoder.layers[index].mlp, seen)
        check_finite(raw, index, kind)
        output = module_output(decoder, kind, weights, raw)
        if decoder.norms != "before":
            seen(kind, "norm of the output", output)
        if decoder.parallel:
            added = seen(kind, "the sum of attention and mlp", added + output)
        else:
            hidden = seen(kind, "the residual stream", hidden + output)
    return seen(kind, "the residual stream", hidden + added) if decoder.parallel else hidden


def _attention(
    x: torch.Tensor, weights: LayerWeights, attention: Attention, tables: Tables, eps: float, seen: _Seen
) -> torch.Tensor:
    """The context is a mean of values, and a query that is not yet turned is as long as the turned one, but before a
    picture's first token, where turning ends in zeros."""
    import torch.nn.functional as F

    from edgeprune.model.forward import attend, attention_heads

    query, key, value = attention_heads(x, weights, attention, tables, eps)
    changes = attention.qk_norm is not None or (attention.rotary is not None and attention.rotary.grid is not None)
    for name, heads in (("q", query), ("k", key), ("v", value)):
        seen("attention", name, heads)
        if name != "v" and (changes or float(heads.norm(dim=-1).max()) > LIMIT):
            raw = F.linear(x, weights[f"attention.{name}"], weights.get(f"attention.{name}_bias"))
            seen("attention", f"{name} before norm and turn", raw)
    _look_at_scores(query, key, attention, seen)
    context = attend(query, key, value, attention, tables.masks[attention.window])
    return seen("attention", "o", F.linear(context, weights["attention.o"], weights.get("attention.o_bias")))


def _look_at_scores(query: torch.Tensor, key: torch.Tensor, attention: Attention, seen: _Seen) -> None:
    """All pairs: masked ones are computed too. Only where the lengths of queries and keys do not exclude it."""
    scale = attention.score_scale / (attention.softcap or 1.0)
    queries = query.unflatten(1, (attention.num_key_value_heads, -1))  # (b, k, g, t, d)
    lengths = queries.norm(dim=-1).amax(dim=(0, 2, 3)) * key.norm(dim=-1).amax(dim=(0, 2))
    if float(lengths.max()) * scale <= LIMIT:
        return
    for own, keys in zip(queries.flatten(0, 1), key.flatten(0, 1), strict=True):
        seen("attention", "the product of q and k", own * scale @ keys.mT)


def _mlp(x: torch.Tensor, weights: LayerWeights, mlp: Mlp, seen: _Seen) -> torch.Tensor:
    import torch.nn.functional as F

    if mlp.experts is None:
        return seen(
            "mlp",
            "down",
            F.linear(_inner(x, weights, mlp, "mlp.", seen), weights["mlp.down"], weights.get("mlp.down_bias")),
        )
    return _experts(x, weights, mlp, seen)


def _inner(x: torch.Tensor, weights: LayerWeights, mlp: Mlp, prefix: str, seen: _Seen) -> torch.Tensor:
    """The input of the down projection."""
    import torch.nn.functional as F

    from edgeprune.model.forward import ACTIVATIONS

    parts = [
        seen("mlp", name, F.linear(x, weights[prefix + name], weights.get(f"{prefix}{name}_bias")))
        for name in mlp.inputs
    ]
    activated = ACTIVATIONS[mlp.activation](parts[0])
    return seen("mlp", "gate times up", activated * parts[1]) if mlp.gated else activated


def _experts(x: torch.Tensor, weights: LayerWeights, mlp: Mlp, seen: _Seen) -> torch.Tensor:
    """Every expert on every token, as in the graph: infinity times a share of 0 would be no number."""
    import torch
    import torch.nn.functional as F

    from edgeprune.model.forward import routed

    flat = x.flatten(0, 1)
    seen("mlp", "router", F.linear(flat, weights["mlp.router"]))
    chosen, taken = routed(flat, weights, mlp.experts)
    shares = torch.zeros(len(flat), mlp.experts.num_experts).scatter_(1, chosen, taken)
    total = torch.zeros_like(flat)
    for expert in range(mlp.experts.num_experts):
        prefix = f"mlp.experts.{expert}."
        each = F.linear(_inner(flat, weights, mlp, prefix, seen), weights[prefix + "down"])
        total += seen("mlp", "down", each) * shares[:, expert, None]
    return seen("mlp", "the sum of experts", total).view_as(x)


def _look_at_head(model: Model, hidden: torch.Tensor, seen: _Seen) -> None:
    """hidden: (n, c). The logits only where the lengths of states and of the head's rows do not exclude it."""
    import torch.nn.functional as F

    from edgeprune.model.forward import LOGIT_ROWS, normed

    decoder = model.decoder
    norm = {name: model.weights[name].float() for name in decoder.norm_shapes("norm")}
    head = model.weights["embedding" if decoder.tie_word_embeddings else "head"].float()
    states = seen("head", "norm", normed(decoder, hidden, norm, "norm"))
    if float(states.norm(dim=-1).max() * head.norm(dim=-1).max()) <= LIMIT:
        return
    for part in states.split(LOGIT_ROWS):
        seen("head", "logits", F.linear(part, head))
