"""The check that fp16 holds what a model computes: the largest values on given samples, before an engine is built.

It walks the model in fp32, so that it goes on where fp16 would not. It covers every tensor that the fp16 graph writes
(engine/onnx/ops.py, engine/onnx/attention.py), except for those that another one bounds, and for those within gelu,
whose infinity tanh or sigmoid turns into the right 1 or 0. It does not know which GPU or engine will run the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from edgeprune.errors import NumericalError

if TYPE_CHECKING:
    import torch

    from edgeprune.model.attention import LayerWeights, Tables
    from edgeprune.model.decoder import Attention, Mlp
    from edgeprune.model.model import Model

LIMIT = 65504.0  # the largest number of fp16
CLOSE = 0.5  # share of LIMIT from which the user is warned


@dataclass(frozen=True)
class Peak:
    """The largest absolute value of a tensor. place: `layer 7 mlp`, `embedding` or `head`."""

    place: str
    tensor: str
    value: float

    def __str__(self) -> str:
        return f"{self.place}: {self.tensor} reaches {self.value:.3g} on the calibration samples, fp16 holds {LIMIT:g}"


def check_fp16(peaks: Iterator[Peak], remedy: str) -> Peak:
    """Returns the largest of the peaks. Raises NumericalError, with the remedy, at the first beyond fp16."""
    largest = Peak("", "", 0.0)
    for peak in peaks:
        if not peak.value <= LIMIT:
            raise NumericalError(str(peak), remedy)
        largest = max(largest, peak, key=lambda peak: peak.value)
    return largest


def activation_peaks(model: Model, ids: torch.Tensor, on_layer: Callable[[], None] = lambda: None) -> Iterator[Peak]:
    """Yields the peaks of a model on ids (samples, tokens) int64, layer by layer, so that its reader can stop the walk.

    One layer's weights and the hidden states of all samples are in memory. Raises NumericalError naming the layer where
    values are not finite in fp32 either.
    """
    import torch

    from edgeprune.model.attention import Tables
    from edgeprune.model.forward import CHUNK_TOKENS, embed, layer_weights, row_chunks

    decoder = model.decoder
    tables = Tables(decoder, ids.shape[1])
    hidden = embed(model, ids)  # (b, t, c)
    yield Peak("embedding", "its output", _largest(hidden))
    # Walk the layers; the hidden states are replaced in place.
    for index in range(len(decoder.layers)):
        weights, record = layer_weights(model, index), _Recorder()
        with torch.inference_mode():
            for hidden_part in row_chunks(hidden, CHUNK_TOKENS):
                hidden_part.copy_(_behind_layer(model, index, weights, hidden_part, tables, record))
        yield from (Peak(f"layer {index} {kind}", tensor, value) for (kind, tensor), value in record.values.items())
        on_layer()
    # The head, on the states behind the last layer.
    with torch.inference_mode():
        record = _Recorder()
        _record_head(model, hidden.flatten(0, 1), record)
    yield from (Peak(kind, tensor, value) for (kind, tensor), value in record.values.items())


def _largest(tensor: torch.Tensor) -> float:
    """Returns the largest absolute value of a tensor."""
    low, high = tensor.aminmax()
    return max(-float(low), float(high))


@dataclass
class _Recorder:
    """The largest absolute value of every tensor that it was called with, over all chunks.

    values: by the kind of module and the tensor's name.
    """

    values: dict[tuple[str, str], float] = field(default_factory=dict)

    def __call__(self, kind: str, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Records a tensor and returns it."""
        self.values[kind, name] = max(_largest(tensor), self.values.get((kind, name), 0.0))
        return tensor


def _behind_layer(
    model: Model, index: int, weights: LayerWeights, hidden: torch.Tensor, tables: Tables, record: _Recorder
) -> torch.Tensor:
    """Returns the residual stream behind a layer for hidden (b, t, c) before it, and records the layer's tensors."""
    import torch

    from edgeprune.model.forward import check_finite, module_output, module_states, modules_of

    decoder = model.decoder
    # Modules that run in parallel all read the stream as it enters; their sum is added at the end.
    added = torch.zeros_like(hidden)  # (b, t, c)
    for kind in modules_of(decoder, index):
        # The module's input and its output projection, as in the forward pass.
        x = module_states(decoder, kind, weights, hidden)
        if decoder.norms != "after":
            record(kind, "norm", x)
        if kind == "attention":
            raw = _attention(x, weights, decoder.layers[index].attention, tables, decoder.norm_eps, record)
        else:
            raw = _mlp(x, weights, decoder.layers[index].mlp, record)
        check_finite(raw, index, kind)
        # What it adds to the stream.
        output = module_output(decoder, kind, weights, raw)
        if decoder.norms != "before":
            record(kind, "norm of the output", output)
        if decoder.parallel:
            added = record(kind, "the sum of attention and mlp", added + output)
        else:
            hidden = record(kind, "the residual stream", hidden + output)
    return record(kind, "the residual stream", hidden + added) if decoder.parallel else hidden


def _attention(
    x: torch.Tensor, weights: LayerWeights, attention: Attention, tables: Tables, eps: float, record: _Recorder
) -> torch.Tensor:
    """Returns the attention's output (b, t, c), before any norm, for its input x (b, t, c), and records its tensors.

    The context needs no record: it is a mean of values. A query before its rotation is as long as after it, except at a
    picture's first token, where the rotation gives zeros: it is recorded for grids, for norms of queries and keys, and
    where the rotated one is longer than LIMIT.
    """
    import torch.nn.functional as F

    from edgeprune.model.attention import attend, attention_heads

    # Queries, keys and values, and the projections that norm or rotation may have made smaller.
    query, key, value = attention_heads(x, weights, attention, tables, eps)
    changes_length = attention.qk_norm is not None or (
        attention.rotary is not None and attention.rotary.grid is not None
    )
    for name, states in (("q", query), ("k", key), ("v", value)):
        record("attention", name, states)
        if name != "v" and (changes_length or float(states.norm(dim=-1).max()) > LIMIT):
            projected = F.linear(x, weights[f"attention.{name}"], weights.get(f"attention.{name}_bias"))
            record("attention", f"{name} before norm and rotation", projected)
    # Scores, context and output.
    _record_scores(query, key, attention, record)
    # (b, t, h * d)
    context = attend(query, key, value, attention, tables.masks[attention.window], weights.get("attention.sinks"))
    return record("attention", "o", F.linear(context, weights["attention.o"], weights.get("attention.o_bias")))


def _record_scores(query: torch.Tensor, key: torch.Tensor, attention: Attention, record: _Recorder) -> None:
    """Records the scores of all pairs, masked ones too, as the graph computes them.

    query: (b, h, t, d); key: (b, k, t, d). Where the lengths of queries and keys exclude a score beyond LIMIT, nothing
    is computed or recorded.
    """
    scale = attention.score_scale / (attention.softcap or 1.0)
    queries = query.unflatten(1, (attention.num_key_value_heads, -1))  # (b, k, g, t, d)
    lengths = queries.norm(dim=-1).amax(dim=(0, 2, 3)) * key.norm(dim=-1).amax(dim=(0, 2))  # (k,)
    if float(lengths.max()) * scale <= LIMIT:
        return
    # One key/value head of one sample at a time: (g, t, d) by (d, t).
    for group_queries, group_keys in zip(queries.flatten(0, 1), key.flatten(0, 1), strict=True):
        record("attention", "the product of q and k", group_queries * scale @ group_keys.mT)


def _mlp(x: torch.Tensor, weights: LayerWeights, mlp: Mlp, record: _Recorder) -> torch.Tensor:
    """Returns the MLP's output (b, t, c), before any norm, for its input x (b, t, c), and records its tensors."""
    import torch.nn.functional as F

    if mlp.experts is None:
        return record(
            "mlp",
            "down",
            F.linear(_inner(x, weights, mlp, "mlp.", record), weights["mlp.down"], weights.get("mlp.down_bias")),
        )
    return _experts(x, weights, mlp, record)


def _inner(x: torch.Tensor, weights: LayerWeights, mlp: Mlp, prefix: str, record: _Recorder) -> torch.Tensor:
    """Returns the input (..., i) of the down projection for the MLP's input x (..., c), and records its tensors.

    prefix: of the weights' names; an expert's is `mlp.experts.{e}.`.
    """
    import torch.nn.functional as F

    from edgeprune.model.mlp import activated

    projected = [
        record("mlp", name, F.linear(x, weights[prefix + name], weights.get(f"{prefix}{name}_bias")))
        for name in mlp.inputs
    ]
    inner = activated(projected, mlp, weights, prefix)
    is_bounded = not mlp.gated and mlp.activation != "xielu"  # by what it reads
    return inner if is_bounded else record("mlp", "gate times up" if mlp.gated else "its activation", inner)


def _experts(x: torch.Tensor, weights: LayerWeights, mlp: Mlp, record: _Recorder) -> torch.Tensor:
    """Returns the sum (b, t, c) of the experts for their input x (b, t, c), and records its tensors.

    Every expert runs on every token, as in the graph: infinity times a share of 0 would not be a number.
    """
    import torch
    import torch.nn.functional as F

    from edgeprune.model.mlp import routed

    flat = x.flatten(0, 1)  # (n, c)
    record("mlp", "router", F.linear(flat, weights["mlp.router"], weights.get("mlp.router_bias")))
    chosen, chosen_shares = routed(flat, weights, mlp.experts)
    shares = torch.zeros(len(flat), mlp.experts.num_experts).scatter_(1, chosen, chosen_shares)  # (n, num_experts)
    total = torch.zeros_like(flat)
    for expert in range(mlp.experts.num_experts):
        prefix = f"mlp.experts.{expert}."
        inner = _inner(flat, weights, mlp, prefix, record)
        output = F.linear(inner, weights[prefix + "down"], weights.get(f"{prefix}down_bias"))  # (n, c)
        total += record("mlp", "down", output) * shares[:, expert, None]
    return record("mlp", "the sum of experts", total).view_as(x)


def _record_head(model: Model, hidden: torch.Tensor, record: _Recorder) -> None:
    """Records the final norm of hidden (n, c) and the logits.

    Where the lengths of states and of the head's rows exclude a logit beyond LIMIT, logits are not computed.
    """
    import torch.nn.functional as F

    from edgeprune.model.forward import LOGIT_ROWS, normed

    decoder = model.decoder
    norm = {name: model.weights[name].float() for name in decoder.norm_shapes("norm")}
    head = model.weights["embedding" if decoder.tie_word_embeddings else "head"].float()
    states = record("head", "norm", normed(decoder, hidden, norm, "norm"))
    if float(states.norm(dim=-1).max() * head.norm(dim=-1).max()) <= LIMIT:
        return
    for chunk_states in states.split(LOGIT_ROWS):
        record("head", "logits", F.linear(chunk_states, head))
