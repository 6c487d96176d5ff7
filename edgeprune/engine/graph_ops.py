"""A Decoder spelled in ONNX operators: norm, rotary embedding, attention and MLP in three dialects.

Weights are named, never seen: graph_data.py says where they stand.
Notation: b batch, s sequence (new tokens), t total (past + new), h query heads, k key/value heads,
g = h / k, d head_dim, c hidden_size, i intermediate_size. Values carry the name of the node that
makes them, and that name carries the layer (`layers.3.attention.o`), so that a builder's error can be read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from edgeprune.engine.graph_data import ROTARY_TABLES
from edgeprune.model.decoder import Attention, Decoder

if TYPE_CHECKING:
    from onnx import NodeProto, TensorProto

Dialect = Literal["opset23", "primitive", "onnxruntime"]
MICROSOFT = "com.microsoft"


@dataclass
class Nodes:
    """The nodes and small constants of one graph while it grows, in execution order."""

    dtype: type[np.floating]  # of weights, activations and cache
    nodes: list[NodeProto] = field(default_factory=list)
    constants: dict[str, TensorProto] = field(default_factory=dict)

    def add(self, operator: str, name: str, *inputs: str, domain: str = "", **attributes: object) -> str:
        """One node with one output, which bears the node's name."""
        return self.add_many(operator, name, inputs, (name,), domain, **attributes)[0]

    def add_many(
        self,
        operator: str,
        name: str,
        inputs: tuple[str, ...],
        outputs: tuple[str, ...],
        domain: str = "",
        **attributes: object,
    ) -> tuple[str, ...]:
        """One node; an empty output name leaves an optional output away."""
        from onnx import helper

        self.nodes.append(helper.make_node(operator, inputs, outputs, name, domain=domain or None, **attributes))
        return outputs

    def constant(self, name: str, value: object, dtype: type[np.generic] = np.int64) -> str:
        """A small constant inside the graph file; equal names are one constant."""
        from onnx import numpy_helper

        if name not in self.constants:
            self.constants[name] = numpy_helper.from_array(np.asarray(value, dtype), name)
        return name

    def sizes(self, *values: int) -> str:
        return self.constant("sizes." + "_".join(map(str, values)), values)


Shared = dict[str, str]  # values made once and read by every layer: mask, cos, sin, lengths


def _lengths(nodes: Nodes) -> Shared:
    """sequence and total as int64 vectors of one element."""
    shape = nodes.add("Shape", "sequence.ids_shape", "input_ids")
    sequence = nodes.add("Slice", "sequence", shape, nodes.sizes(1), nodes.sizes(2))
    shape = nodes.add("Shape", "total.mask_shape", "attention_mask")
    batch = nodes.add("Slice", "batch", shape, nodes.sizes(0), nodes.sizes(1))
    total = nodes.add("Slice", "total", shape, nodes.sizes(1), nodes.sizes(2))
    return {"batch": batch, "sequence": sequence, "total": total}


def _masked(nodes: Nodes) -> str:
    """The additive value of a masked pair: far below any score, and finite after adding one, so that
    a row with nothing to attend to (left padding) gives numbers and not NaN."""
    return nodes.constant("mask.minimum", float(np.finfo(nodes.dtype).min) / 2, nodes.dtype)


def _additive_mask(nodes: Nodes, lengths: Shared) -> str:
    """(b, 1, s, t): 0 where the query may see the key (a real token, not later than the query)."""
    zero, one = nodes.constant("zero", 0), nodes.constant("one", 1)
    total = nodes.add("Squeeze", "mask.total", lengths["total"], nodes.sizes(0))
    sequence = nodes.add("Squeeze", "mask.sequence", lengths["sequence"], nodes.sizes(0))
    past = nodes.add("Sub", "mask.past", total, sequence)
    keys = nodes.add("Range", "mask.keys", zero, total, one)  # (t,)
    queries = nodes.add("Range", "mask.query_range", past, total, one)
    queries = nodes.add("Unsqueeze", "mask.queries", queries, nodes.sizes(1))  # (s, 1)
    causal = nodes.add("LessOrEqual", "mask.causal", keys, queries)
    real = nodes.add("Greater", "mask.real_tokens", "attention_mask", zero)
    real = nodes.add("Unsqueeze", "mask.real", real, nodes.sizes(1, 2))  # (b, 1, 1, t)
    seen = nodes.add("And", "mask.seen", causal, real)
    return nodes.add("Where", "mask", seen, nodes.constant("mask.zero", 0, nodes.dtype), _masked(nodes))


def _angles(nodes: Nodes, decoder: Decoder) -> tuple[str, str]:
    """cos and sin (b, s, d / 2) fp32 of the given positions, times the rotary scaling."""
    from onnx import TensorProto

    frequencies = nodes.constant("rotary.frequencies", decoder.rotary.inverse_frequencies, np.float32)
    positions = nodes.add("Cast", "rotary.positions", "position_ids", to=TensorProto.FLOAT)
    positions = nodes.add("Unsqueeze", "rotary.columns", positions, nodes.sizes(2))
    angles = nodes.add("Mul", "rotary.angles", positions, frequencies)
    cos, sin = nodes.add("Cos", "rotary.cos", angles), nodes.add("Sin", "rotary.sin", angles)
    if decoder.rotary.scaling != 1.0:
        scaling = nodes.constant("rotary.scaling", decoder.rotary.scaling, np.float32)
        cos = nodes.add("Mul", "rotary.cos_scaled", cos, scaling)
        sin = nodes.add("Mul", "rotary.sin_scaled", sin, scaling)
    return cos, sin


def _cast(nodes: Nodes, name: str, value: str) -> str:
    """From fp32 to the graph's type; nothing where they are the same."""
    from onnx import helper

    if nodes.dtype == np.float32:
        return value
    return nodes.add("Cast", name, value, to=helper.np_dtype_to_tensor_dtype(np.dtype(nodes.dtype)))


def _prepare_opset23(nodes: Nodes, decoder: Decoder) -> Shared:
    cos, sin = _angles(nodes, decoder)
    return {
        "mask": _additive_mask(nodes, _lengths(nodes)),
        "cos": _cast(nodes, "rotary.cos_cast", cos),
        "sin": _cast(nodes, "rotary.sin_cast", sin),
    }


def _prepare_primitive(nodes: Nodes, decoder: Decoder) -> Shared:
    """cos as (b, 1, s, d) = [cos, cos]; sin as [-sin, sin], so that rotating needs no negation."""
    cos, sin = _angles(nodes, decoder)
    cos = nodes.add("Concat", "rotary.cos_head", cos, cos, axis=-1)
    sin = nodes.add("Concat", "rotary.sin_head", nodes.add("Neg", "rotary.sin_negative", sin), sin, axis=-1)
    cos = nodes.add("Unsqueeze", "rotary.cos_heads", cos, nodes.sizes(1))
    sin = nodes.add("Unsqueeze", "rotary.sin_heads", sin, nodes.sizes(1))
    return {
        "mask": _additive_mask(nodes, _lengths(nodes)),
        "cos": _cast(nodes, "rotary.cos_cast", cos),
        "sin": _cast(nodes, "rotary.sin_cast", sin),
    }


def _prepare_onnxruntime(nodes: Nodes, decoder: Decoder) -> Shared:
    """The lengths that GroupQueryAttention asks for, and the padding as a bias (b, 1, s, t).

    Every row of the batch is `total` long: left padding is hidden by the bias, not by a length.
    query_seqlens says that all new tokens are real; with it the operator takes several tokens on a
    filled cache in a batch, and reads every element of position_ids.
    """
    from onnx import TensorProto

    lengths = _lengths(nodes)
    total = nodes.add("Cast", "lengths.total", lengths["total"], to=TensorProto.INT32)
    sequence = nodes.add("Cast", "lengths.sequence", lengths["sequence"], to=TensorProto.INT32)
    last = nodes.add("Sub", "lengths.last_slot", total, nodes.constant("lengths.one", [1], np.int32))
    padding = nodes.add("Equal", "bias.padding_tokens", "attention_mask", nodes.constant("zero", 0))
    padding = nodes.add("Unsqueeze", "bias.padding", padding, nodes.sizes(1, 2))
    keys = nodes.add("Where", "bias.keys", padding, _masked(nodes), nodes.constant("mask.zero", 0, nodes.dtype))
    queries = nodes.add("Concat", "bias.queries", nodes.sizes(1, 1), lengths["sequence"], nodes.sizes(1), axis=0)
    return {
        "total": total,
        "seqlens_k": nodes.add("Expand", "lengths.seqlens_k", last, lengths["batch"]),
        "query_seqlens": nodes.add("Expand", "lengths.query_seqlens", sequence, lengths["batch"]),
        "bias": nodes.add("Expand", "bias", keys, queries),
    }


def _add_update(nodes: Nodes, hidden: str, update: str | None) -> str:
    return hidden if update is None else nodes.add("Add", f"{update}.residual", hidden, update)


def _norm_opset23(nodes: Nodes, name: str, hidden: str, update: str | None, weight: str, eps: float) -> tuple[str, str]:
    hidden = _add_update(nodes, hidden, update)
    return hidden, nodes.add("RMSNormalization", name, hidden, weight, axis=-1, epsilon=eps, stash_type=1)


def _norm_primitive(
    nodes: Nodes, name: str, hidden: str, update: str | None, weight: str, eps: float
) -> tuple[str, str]:
    """weight * x / sqrt(mean(x^2) + eps), the mean in fp32 (Zhang and Sennrich 2019, eq. 4)."""
    from onnx import TensorProto

    hidden = _add_update(nodes, hidden, update)
    x = hidden if nodes.dtype == np.float32 else nodes.add("Cast", f"{name}.fp32", hidden, to=TensorProto.FLOAT)
    square = nodes.add("Pow", f"{name}.square", x, nodes.constant("norm.two", 2, np.float32))
    mean = nodes.add("ReduceMean", f"{name}.mean", square, axes=[-1], keepdims=1)
    shifted = nodes.add("Add", f"{name}.shifted", mean, nodes.constant("norm.epsilon", eps, np.float32))
    scaled = nodes.add("Div", f"{name}.scaled", x, nodes.add("Sqrt", f"{name}.rms", shifted))
    return hidden, nodes.add("Mul", name, _cast(nodes, f"{name}.cast", scaled), weight)


def _norm_onnxruntime(
    nodes: Nodes, name: str, hidden: str, update: str | None, weight: str, eps: float
) -> tuple[str, str]:
    if update is None:
        attributes = {"axis": -1, "epsilon": eps, "stash_type": 1}
        return hidden, nodes.add("SimplifiedLayerNormalization", name, hidden, weight, **attributes)
    normed, _, _, hidden = nodes.add_many(
        "SkipSimplifiedLayerNormalization",
        name,
        (hidden, update, weight),
        (name, "", "", f"{update}.residual"),
        MICROSOFT,
        epsilon=eps,
    )
    return hidden, normed


def _split_heads(nodes: Nodes, name: str, packed: str, attention: Attention) -> tuple[str, str]:
    """(b, s, (h + 2k) * d) -> query and key heads together (b, h + k, s, d), value heads (b, k, s, d)."""
    h, k, d = attention.num_attention_heads, attention.num_key_value_heads, attention.head_dim
    heads = nodes.add("Reshape", f"{name}.split_heads", packed, nodes.sizes(0, 0, h + 2 * k, d))
    heads = nodes.add("Transpose", f"{name}.heads", heads, perm=[0, 2, 1, 3])
    inputs = (heads, nodes.sizes(h + k, k))
    query_key, value = nodes.add_many("Split", f"{name}.split", inputs, (f"{name}.qk", f"{name}.value"), axis=1)
    return query_key, value


def _with_cache(
    nodes: Nodes, name: str, rotated: str, value: str, attention: Attention, cache: tuple[str, ...]
) -> tuple[str, str, str]:
    """Rotated query and key heads and new values -> query (b, h, s, d), all keys and values (b, k, t, d)."""
    past_key, past_value, present_key, present_value = cache
    inputs = (rotated, nodes.sizes(attention.num_attention_heads, attention.num_key_value_heads))
    query, key = nodes.add_many("Split", f"{name}.split_qk", inputs, (f"{name}.query", f"{name}.key"), axis=1)
    (key,) = nodes.add_many("Concat", f"{name}.keys", (past_key, key), (present_key,), axis=2)
    (value,) = nodes.add_many("Concat", f"{name}.values", (past_value, value), (present_value,), axis=2)
    return query, key, value


def _join_heads(nodes: Nodes, name: str, context: str, attention: Attention) -> str:
    context = nodes.add("Transpose", f"{name}.tokens", context, perm=[0, 2, 1, 3])
    return nodes.add("Reshape", f"{name}.context", context, nodes.sizes(0, 0, attention.query_size))


def _attention_opset23(
    nodes: Nodes, name: str, packed: str, attention: Attention, cache: tuple[str, ...], shared: Shared
) -> str:
    query_key, value = _split_heads(nodes, name, packed, attention)
    rotated = nodes.add("RotaryEmbedding", f"{name}.rotary", query_key, shared["cos"], shared["sin"])
    query, key, value = _with_cache(nodes, name, rotated, value, attention, cache)
    scale = attention.head_dim**-0.5
    context = nodes.add("Attention", f"{name}.attend", query, key, value, shared["mask"], scale=scale)
    return _join_heads(nodes, name, context, attention)


def _attention_primitive(
    nodes: Nodes, name: str, packed: str, attention: Attention, cache: tuple[str, ...], shared: Shared
) -> str:
    """Grouped queries share a key head as rows of one product: (b, k, g * s, d) x (b, k, d, t)."""
    h, k, d = attention.num_attention_heads, attention.num_key_value_heads, attention.head_dim
    query_key, value = _split_heads(nodes, name, packed, attention)
    inputs = (query_key, nodes.sizes(d // 2, d // 2))
    first, second = nodes.add_many("Split", f"{name}.halves", inputs, (f"{name}.first", f"{name}.second"), axis=-1)
    swapped = nodes.add("Concat", f"{name}.swapped", second, first, axis=-1)
    cos = nodes.add("Mul", f"{name}.cos", query_key, shared["cos"])
    rotated = nodes.add("Add", f"{name}.rotary", cos, nodes.add("Mul", f"{name}.sin", swapped, shared["sin"]))
    query, key, value = _with_cache(nodes, name, rotated, value, attention, cache)

    query = nodes.add("Mul", f"{name}.scaled", query, nodes.constant(f"scale.{d}", d**-0.5, nodes.dtype))
    keys = nodes.add("Transpose", f"{name}.keys_transposed", key, perm=[0, 1, 3, 2])
    if h != k:
        query = nodes.add("Reshape", f"{name}.groups", query, nodes.sizes(0, k, -1, d))
    scores = nodes.add("MatMul", f"{name}.scores", query, keys)
    if h != k:
        scores = nodes.add("Reshape", f"{name}.scores_heads", scores, nodes.sizes(0, h, -1, 0))  # (b, h, s, t)
    scores = nodes.add("Add", f"{name}.masked", scores, shared["mask"])
    shares = nodes.add("Softmax", f"{name}.softmax", scores, axis=-1)
    if h != k:
        shares = nodes.add("Reshape", f"{name}.softmax_groups", shares, nodes.sizes(0, k, -1, 0))
    context = nodes.add("MatMul", f"{name}.attend", shares, value)
    if h != k:
        context = nodes.add("Reshape", f"{name}.context_heads", context, nodes.sizes(0, h, -1, d))
    return _join_heads(nodes, name, context, attention)


def _attention_onnxruntime(
    nodes: Nodes, name: str, packed: str, attention: Attention, cache: tuple[str, ...], shared: Shared
) -> str:
    past_key, past_value, present_key, present_value = cache
    inputs = (
        packed, "", "", past_key, past_value, shared["seqlens_k"], shared["total"], *ROTARY_TABLES, "position_ids",
        shared["bias"], "", "", "", "", "", shared["query_seqlens"],
    )  # fmt: skip
    attributes = {
        "num_heads": attention.num_attention_heads,
        "kv_num_heads": attention.num_key_value_heads,
        "scale": attention.head_dim**-0.5,
        "do_rotary": 1,
    }
    outputs = (f"{name}.context", present_key, present_value)
    return nodes.add_many("GroupQueryAttention", f"{name}.attend", inputs, outputs, MICROSOFT, **attributes)[0]


@dataclass(frozen=True)
class Operators:
    """How one dialect spells the parts that dialects differ in."""

    opsets: dict[str, int]
    ir_version: int
    prepare: Callable[[Nodes, Decoder], Shared]
    norm: Callable[[Nodes, str, str, str | None, str, float], tuple[str, str]]
    attention: Callable[[Nodes, str, str, Attention, tuple[str, ...], Shared], str]


OPERATORS: dict[Dialect, Operators] = {
    "opset23": Operators({"": 23}, 11, _prepare_opset23, _norm_opset23, _attention_opset23),
    "primitive": Operators({"": 17}, 8, _prepare_primitive, _norm_primitive, _attention_primitive),
    "onnxruntime": Operators(
        {"": 17, MICROSOFT: 1}, 8, _prepare_onnxruntime, _norm_onnxruntime, _attention_onnxruntime
    ),
}


def mlp(nodes: Nodes, name: str, x: str, width: int) -> str:
    """down(silu(gate(x)) * up(x)); gate and up are one product of 2 * width columns, split in halves."""
    inputs = (nodes.add("MatMul", f"{name}.gate_up", x, f"{name}.gate_up.weight"), nodes.sizes(width, width))
    gate, up = nodes.add_many("Split", f"{name}.split", inputs, (f"{name}.gate", f"{name}.up"), axis=-1)
    silu = nodes.add("Mul", f"{name}.silu", gate, nodes.add("Sigmoid", f"{name}.sigmoid", gate))
    return nodes.add("MatMul", f"{name}.down", nodes.add("Mul", f"{name}.gated", silu, up), f"{name}.down.weight")
