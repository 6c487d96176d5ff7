"""Attention in the operators of four dialects: rotary embedding, masks and the KV cache.

It knows the names of weights and not their values. Notation as in ops.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgeprune.engine.onnx.data import rotary_tables, rotates_by_tables
from edgeprune.engine.onnx.nodes import (
    MICROSOFT,
    WRITE_INDICES,
    Nodes,
    Shared,
    additive_masks,
    cache_codes,
    head_width,
    lengths,
    masked,
)
from edgeprune.model.decoder import Attention, Decoder, Rotary
from edgeprune.precision import CacheFormat


def _angles(nodes: Nodes, rotary: Rotary, name: str) -> tuple[str, str]:
    """Returns cos and sin (b, s, turned / 2) fp32 of the angles at position_ids (b, s), times the rotary scaling."""
    scaling = None
    if rotary.scaling != 1.0 or rotary.grid is not None:
        scaling = nodes.constant(f"{name}.scaling", rotary.scaling, np.float32)
    if rotary.grid is None:
        angles = _turns(nodes, f"{name}.angles", "position_ids", rotary.inverse_frequencies)
    else:
        angles, scaling = _grid_angles(nodes, rotary, name, scaling)
    cos, sin = nodes.add("Cos", f"{name}.cos", angles), nodes.add("Sin", f"{name}.sin", angles)
    if scaling is not None:
        cos = nodes.add("Mul", f"{name}.cos_scaled", cos, scaling)
        sin = nodes.add("Mul", f"{name}.sin_scaled", sin, scaling)
    return cos, sin


def _grid_angles(nodes: Nodes, rotary: Rotary, name: str, scaling: str) -> tuple[str, str]:
    """Returns angles (b, s, turned / 2) by row and column, and the factor (b, s, 1) of cos and sin: 0 in the prefix."""
    prefix = nodes.constant(f"{name}.prefix", rotary.grid.prefix)
    side = nodes.constant(f"{name}.side", rotary.grid.side)
    # The first half of the pairs turns by the row in the grid, the second half by the column.
    places = nodes.add("Sub", f"{name}.places", "position_ids", prefix)
    half, angles = len(rotary.inverse_frequencies) // 2, []
    for axis, operator, pairs in (("row", "Div", slice(half)), ("column", "Mod", slice(half, None))):
        numbers = nodes.add(operator, f"{name}.{axis}", places, side)
        angles.append(_turns(nodes, f"{name}.by_{axis}", numbers, rotary.inverse_frequencies[pairs]))
    # cos and sin are 0 in the prefix.
    outside = nodes.add("Less", f"{name}.in_prefix", "position_ids", prefix)
    outside = nodes.add("Unsqueeze", f"{name}.in_prefix_of_pairs", outside, nodes.sizes(2))
    factor = nodes.add("Where", f"{name}.seen", outside, nodes.constant("zero.fp32", 0.0, np.float32), scaling)
    return nodes.add("Concat", f"{name}.angles", *angles, axis=-1), factor


def _turns(nodes: Nodes, name: str, numbers: str, frequencies: Sequence[float]) -> str:
    """Returns the angles (b, s, frequencies) fp32 of numbers (b, s) int64."""
    from onnx import TensorProto

    numbers = nodes.add("Cast", f"{name}.numbers", numbers, to=TensorProto.FLOAT)
    numbers = nodes.add("Unsqueeze", f"{name}.numbers_of_pairs", numbers, nodes.sizes(2))  # (b, s, 1)
    return nodes.add("Mul", name, numbers, nodes.constant(f"{name}.frequencies", frequencies, np.float32))


def _rotary_name(decoder: Decoder, rotary: Rotary) -> str:
    """Returns the name of the values that belong to one of a decoder's rotary embeddings."""
    number = decoder.rotaries.index(rotary)
    return f"rotary.{number}" if number else "rotary"


def prepare_opset23(nodes: Nodes, decoder: Decoder) -> Shared:
    """Adds the masks (b, 1, s, t), and cos and sin (b, s, turned / 2) of every rotary embedding, for all layers."""
    return additive_masks(nodes, decoder.windows) | _standard_angles(nodes, decoder)


def prepare_opset24(nodes: Nodes, decoder: Decoder) -> Shared:
    """Adds what prepare_opset23 adds, with masks over the whole capacity of the KV cache, and names its write indices.

    TensorRT 10.15 has no input for the number of keys (nonpad_kv_seqlen), so free slots are masked.
    """
    masks = additive_masks(nodes, decoder.windows, in_place=True)
    return {"write_indices": WRITE_INDICES} | masks | _standard_angles(nodes, decoder)


def _standard_angles(nodes: Nodes, decoder: Decoder) -> Shared:
    """Adds cos and sin (b, s, turned / 2) of every rotary embedding, as the operator RotaryEmbedding takes them."""
    shared: Shared = {}
    for rotary in decoder.rotaries:
        name = _rotary_name(decoder, rotary)
        cos, sin = _angles(nodes, rotary, name)
        shared |= {
            f"{name}.cos": nodes.from_fp32(f"{name}.cos_cast", cos),
            f"{name}.sin": nodes.from_fp32(f"{name}.sin_cast", sin),
        }
    return shared


def prepare_primitive(nodes: Nodes, decoder: Decoder) -> Shared:
    """Adds the masks (b, 1, s, t), and cos and sin (b, 1, s, turned) of every rotary embedding, for all layers."""
    shared = additive_masks(nodes, decoder.windows)
    for rotary in decoder.rotaries:
        shared |= _primitive_angles(nodes, rotary, _rotary_name(decoder, rotary), heads=1)
    return shared


def _primitive_angles(nodes: Nodes, rotary: Rotary, name: str, heads: int) -> Shared:
    """Adds cos as [cos, cos] and sin as [-sin, sin], so that a rotation needs no negation.

    heads: the axis of size 1 for the heads, so that they are (b, 1, s, turned) for 1 and (b, s, 1, turned) for 2.
    """
    cos, sin = _angles(nodes, rotary, name)
    cos = nodes.add("Concat", f"{name}.cos_head", cos, cos, axis=-1)  # (b, s, turned)
    sin = nodes.add("Concat", f"{name}.sin_head", nodes.add("Neg", f"{name}.sin_negative", sin), sin, axis=-1)
    cos = nodes.add("Unsqueeze", f"{name}.cos_heads", cos, nodes.sizes(heads))
    sin = nodes.add("Unsqueeze", f"{name}.sin_heads", sin, nodes.sizes(heads))
    return {
        f"{name}.cos": nodes.from_fp32(f"{name}.cos_cast", cos),
        f"{name}.sin": nodes.from_fp32(f"{name}.sin_cast", sin),
    }


def prepare_onnxruntime(nodes: Nodes, decoder: Decoder) -> Shared:
    """Adds the lengths that GroupQueryAttention needs, and the padding as a bias (b, 1, s, t), for all layers.

    Every row of the batch is `total` long: padding is hidden by the bias, not by a length. But where one token is new,
    a row ends at the last one of its mask, so that rows whose pasts differ take a step together. query_seqlens marks
    all new tokens as real. With it the operator takes several tokens at a time on a filled KV cache in a batch, and
    reads every element of position_ids.
    """
    from onnx import TensorProto

    # Lengths as int32: the whole, the new tokens, and each row's last slot of the cache.
    sizes = lengths(nodes)
    total = nodes.add("Cast", "lengths.total", sizes["total"], to=TensorProto.INT32)
    sequence = nodes.add("Cast", "lengths.sequence", sizes["sequence"], to=TensorProto.INT32)
    last = nodes.add("ArgMax", "lengths.last_token", "attention_mask", axis=1, keepdims=0, select_last_index=1)  # (b,)
    last = nodes.add("Cast", "lengths.last_token_int32", last, to=TensorProto.INT32)
    end = nodes.add("Sub", "lengths.last_slot", total, nodes.constant("lengths.one", [1], np.int32))
    is_step = nodes.add("Equal", "lengths.is_step", sizes["sequence"], nodes.sizes(1))
    # The bias of padding tokens.
    padding = nodes.add("Equal", "bias.padding_tokens", "attention_mask", nodes.constant("zero", 0))
    padding = nodes.add("Unsqueeze", "bias.padding", padding, nodes.sizes(1, 2))  # (b, 1, 1, t)
    keys = nodes.add("Where", "bias.keys", padding, masked(nodes), nodes.number("mask.zero", 0.0))
    # The shape (1, 1, s, 1) that the bias is expanded to.
    queries = nodes.add("Concat", "bias.queries", nodes.sizes(1, 1), sizes["sequence"], nodes.sizes(1), axis=0)
    # The angles of the rotary embeddings that the operator does not support.
    attentions = [layer.attention for layer in decoder.layers if layer.attention]
    angles: Shared = {}
    for rotary in dict.fromkeys(attention.rotary for attention in attentions if _turns_before(attention)):
        angles |= _primitive_angles(nodes, rotary, _rotary_name(decoder, rotary), heads=2)
    return angles | {
        "total": total,
        "seqlens_k": nodes.add("Where", "lengths.seqlens_k", is_step, last, end),  # (b,)
        "query_seqlens": nodes.add("Expand", "lengths.query_seqlens", sequence, sizes["batch"]),
        "bias": nodes.add("Expand", "bias", keys, queries),
    }


def _split_heads(nodes: Nodes, name: str, packed: str, attention: Attention) -> tuple[str, str]:
    """Splits packed (b, s, (h + 2k) * d).

    Returns query and key heads together (b, h + k, s, d), and value heads (b, k, s, d).
    """
    h, k, d = attention.num_attention_heads, attention.num_key_value_heads, attention.head_dim
    heads = nodes.add("Reshape", f"{name}.split_heads", packed, nodes.sizes(0, 0, h + 2 * k, d))
    heads = nodes.add("Transpose", f"{name}.heads", heads, perm=[0, 2, 1, 3])  # (b, h + 2k, s, d)
    inputs = (heads, nodes.sizes(h + k, k))
    query_key, value = nodes.add_many("Split", f"{name}.split", inputs, (f"{name}.qk", f"{name}.value"), axis=1)
    return query_key, value


def _with_cache(
    nodes: Nodes,
    name: str,
    rotated: str,
    value: str,
    attention: Attention,
    cache: tuple[str, ...],
    shared: Shared,
    codes: CacheFormat | None = None,
) -> tuple[str, str, str]:
    """Appends the new keys and values to the KV cache: written into its slots where shared has write indices.

    rotated: query and key heads (b, h + k, s, d); value: (b, k, s, d); cache: names as of _cache_names; codes: what the
    cache holds, None for floats. Returns the query (b, h, s, d), and all keys and values (b, k, t, d), of codes as
    floats.
    """
    past_key, past_value, present_key, present_value = cache
    inputs = (rotated, nodes.sizes(attention.num_attention_heads, attention.num_key_value_heads))
    query, key = nodes.add_many("Split", f"{name}.split_qk", inputs, (f"{name}.query", f"{name}.key"), axis=1)
    if indices := shared.get("write_indices"):
        nodes.add_many("TensorScatter", f"{name}.keys", (past_key, key, indices), (present_key,), axis=2)
        nodes.add_many("TensorScatter", f"{name}.values", (past_value, value, indices), (present_value,), axis=2)
        return query, present_key, present_value
    if codes is not None:
        key, value = (_codes(nodes, name, part, x, codes) for part, x in (("key", key), ("value", value)))
    (key,) = nodes.add_many("Concat", f"{name}.keys", (past_key, key), (present_key,), axis=2)
    (value,) = nodes.add_many("Concat", f"{name}.values", (past_value, value), (present_value,), axis=2)
    if codes is not None:
        one = nodes.number("one.float", 1.0)
        key, value = (nodes.add("DequantizeLinear", f"{x}.floats", x, one) for x in (key, value))
    return query, key, value


def _codes(nodes: Nodes, name: str, part: str, states: str, codes: CacheFormat) -> str:
    """Adds the codes (b, k, s, d) of new keys or values of the same shape; part: `key` or `value`."""
    scale = nodes.from_fp32(f"{name}.{part}_scale_cast", f"{name}.{part}_scale")
    scaled = nodes.add("Div", f"{name}.{part}_scaled", states, scale)
    inputs = (scaled, nodes.number("one.float", 1.0), nodes.zero(codes.onnx_type))
    return nodes.add("QuantizeLinear", f"{name}.{part}_codes", *inputs)


def _scale_of_heads(nodes: Nodes, name: str, part: str, attention: Attention) -> str:
    """Adds the scales (1, h, 1, d) of the channels that each query head reads; part: `key` or `value`."""
    h, k, g, d = (
        attention.num_attention_heads,
        attention.num_key_value_heads,
        attention.heads_per_group,
        attention.head_dim,
    )
    scale = nodes.from_fp32(f"{name}.{part}_scale_of_queries", f"{name}.{part}_scale")  # (1, k, 1, d)
    if g > 1:
        scale = nodes.add("Expand", f"{name}.{part}_scale_of_group", scale, nodes.sizes(1, k, g, d))
    return nodes.add("Reshape", f"{name}.{part}_scale_of_heads", scale, nodes.sizes(1, h, 1, d))


def _join_heads(nodes: Nodes, name: str, context: str, attention: Attention) -> str:
    """Joins the heads of a context (b, h, s, d) to (b, s, h * d)."""
    context = nodes.add("Transpose", f"{name}.tokens", context, perm=[0, 2, 1, 3])  # (b, s, h, d)
    return nodes.add("Reshape", f"{name}.context", context, nodes.sizes(0, 0, attention.query_size))


def _turned(
    nodes: Nodes,
    name: str,
    heads: str,
    attention: Attention,
    decoder: Decoder,
    shared: Shared,
    is_primitive: bool,
    heads_axis: int = 1,
) -> str:
    """Rotates heads by their positions, and multiplies them by the weights of a norm behind that.

    heads: (b, h + k, s, d), or (b, s, h + k, d) where heads_axis is 2. Returns the same shape.
    """
    rotated = _rotated(nodes, name, heads, attention, decoder, shared, is_primitive)
    if attention.qk_norm != "turned":
        return rotated
    counts = {"q": attention.num_attention_heads, "k": attention.num_key_value_heads}
    weights = []
    for part, count in counts.items():
        shape = (count, 1, attention.head_dim) if heads_axis == 1 else (count, attention.head_dim)
        weights.append(nodes.add("Expand", f"{name}.{part}_weights", f"{name}.{part}_norm.weight", nodes.sizes(*shape)))
    return nodes.add("Mul", f"{name}.normed_heads", rotated, nodes.add("Concat", f"{name}.weights", *weights, axis=0))


def _rotated(
    nodes: Nodes, name: str, heads: str, attention: Attention, decoder: Decoder, shared: Shared, is_primitive: bool
) -> str:
    """Rotates heads by their positions, in the first `turned` dimensions of each.

    heads: (b, h + k, s, d), or (b, s, h + k, d) where the shared angles have their axis of heads there. Returns the
    same shape.
    """
    if (rotary := attention.rotary) is None:
        return heads
    base, turned = _rotary_name(decoder, rotary), 2 * len(rotary.inverse_frequencies)
    cos, sin = shared[f"{base}.cos"], shared[f"{base}.sin"]
    # Leave out the dimensions that are not rotated.
    rest = None
    if turned < attention.head_dim:
        inputs = (heads, nodes.sizes(turned, attention.head_dim - turned))
        outputs = (f"{name}.turned", f"{name}.unturned")
        heads, rest = nodes.add_many("Split", f"{name}.split_turned", inputs, outputs, axis=-1)
    # Rotate the others: x * [cos, cos] + swapped halves * [-sin, sin] in primitive operators.
    if is_primitive:
        inputs = (heads, nodes.sizes(turned // 2, turned // 2))
        first, second = nodes.add_many("Split", f"{name}.halves", inputs, (f"{name}.first", f"{name}.second"), axis=-1)
        swapped = nodes.add("Concat", f"{name}.swapped", second, first, axis=-1)
        cosine = nodes.add("Mul", f"{name}.cos", heads, cos)
        rotated = nodes.add("Add", f"{name}.rotary", cosine, nodes.add("Mul", f"{name}.sin", swapped, sin))
    else:
        rotated = nodes.add("RotaryEmbedding", f"{name}.rotary", heads, cos, sin)
    return rotated if rest is None else nodes.add("Concat", f"{name}.whole_heads", rotated, rest, axis=-1)


def attention_opset23(
    nodes: Nodes, name: str, packed: str, attention: Attention, decoder: Decoder, cache: tuple[str, ...], shared: Shared
) -> str:
    """Adds an attention in the operator Attention, from packed (b, s, (h + 2k) * d) to (b, s, h * d).

    It serves opset 24 too, where shared has the write indices of the KV cache. It is written in operators of opset 17
    in three cases. With a softcap, because Attention applies it after the mask in opset 23, which would make masked
    pairs visible; with a single head, for which TensorRT for RTX has no kernel; and with sinks, which Attention does
    not have.

    A KV cache in codes, which only opset 23 has, is dequantised with a scale of 1, because TensorRT takes one scale for
    a whole tensor here; the scales of the channels are in the queries and in the context, whose channels they are too.
    """
    query_key, value = _split_heads(nodes, name, packed, attention)
    rotated = _turned(nodes, name, query_key, attention, decoder, shared, is_primitive=False)
    codes = cache_codes(attention, "opset24" if "write_indices" in shared else "opset23")
    query, key, value = _with_cache(nodes, name, rotated, value, attention, cache, shared, codes)
    if codes is not None:
        query = nodes.add("Mul", f"{name}.query_of_codes", query, _scale_of_heads(nodes, name, "key", attention))
    mask = shared[f"mask.{attention.window}"]
    if attention.softcap is not None or attention.num_attention_heads == 1 or attention.sinks:
        context = _attend(nodes, name, query, key, value, attention, mask)
    else:
        scale = attention.score_scale
        context = nodes.add("Attention", f"{name}.attend", query, key, value, mask, scale=scale)
    if codes is not None:
        context = nodes.add("Mul", f"{name}.context_values", context, _scale_of_heads(nodes, name, "value", attention))
    return _join_heads(nodes, name, context, attention)


def attention_primitive(
    nodes: Nodes, name: str, packed: str, attention: Attention, decoder: Decoder, cache: tuple[str, ...], shared: Shared
) -> str:
    """Adds an attention in operators of opset 17, from packed (b, s, (h + 2k) * d) to (b, s, h * d)."""
    query_key, value = _split_heads(nodes, name, packed, attention)
    rotated = _turned(nodes, name, query_key, attention, decoder, shared, is_primitive=True)
    query, key, value = _with_cache(nodes, name, rotated, value, attention, cache, shared)
    context = _attend(nodes, name, query, key, value, attention, shared[f"mask.{attention.window}"])
    return _join_heads(nodes, name, context, attention)


def _attend(nodes: Nodes, name: str, query: str, key: str, value: str, attention: Attention, mask: str) -> str:
    """Adds scores, softmax and weighted sum, from query (b, h, s, d), key and value (b, k, t, d) to (b, h, s, d).

    The query heads of a group are rows of one product with their key head: (b, k, g * s, d) x (b, k, d, t).
    mask: (b, 1, s, t), added to the scores.
    """
    h, k, d = attention.num_attention_heads, attention.num_key_value_heads, attention.head_dim
    scale, cap = attention.score_scale, attention.softcap
    if cap is not None:
        scale /= cap
    # The scores, with the scale in the queries.
    query = nodes.add("Mul", f"{name}.scaled", query, nodes.number(f"scale.{scale}", scale))
    keys = nodes.add("Transpose", f"{name}.keys_transposed", key, perm=[0, 1, 3, 2])  # (b, k, d, t)
    if h != k:
        query = nodes.add("Reshape", f"{name}.groups", query, nodes.sizes(0, k, -1, d))  # (b, k, g * s, d)
    scores = nodes.add("MatMul", f"{name}.scores", query, keys)  # (b, k, g * s, t)
    if h != k:
        scores = nodes.add("Reshape", f"{name}.scores_heads", scores, nodes.sizes(0, h, -1, 0))  # (b, h, s, t)
    # Softcap before mask, and softmax over the keys.
    if cap is not None:
        scores = nodes.add("Tanh", f"{name}.squashed", scores)
        scores = nodes.add("Mul", f"{name}.capped", scores, nodes.number(f"softcap.{cap}", cap))
    scores = nodes.add("Add", f"{name}.masked", scores, mask)
    if attention.sinks:
        scores = nodes.add("Concat", f"{name}.scores_and_sinks", scores, _sinks(nodes, name, scores, h), axis=-1)
    shares = nodes.add("Softmax", f"{name}.softmax", scores, axis=-1)
    if attention.sinks:
        shares = nodes.add("Slice", f"{name}.shares", shares, nodes.sizes(0), nodes.sizes(-1), nodes.sizes(3))
    # The weighted sum of the values.
    if h != k:
        shares = nodes.add("Reshape", f"{name}.softmax_groups", shares, nodes.sizes(0, k, -1, 0))  # (b, k, g * s, t)
    context = nodes.add("MatMul", f"{name}.attend", shares, value)  # (b, k, g * s, d)
    if h != k:
        context = nodes.add("Reshape", f"{name}.context_heads", context, nodes.sizes(0, h, -1, d))
    return context


def _sinks(nodes: Nodes, name: str, scores: str, heads: int) -> str:
    """Adds the sink of each head as one more score (b, h, s, 1) beside scores (b, h, s, t)."""
    shape = nodes.add("Shape", f"{name}.scores_shape", scores)
    rows = nodes.add("Slice", f"{name}.scores_rows", shape, nodes.sizes(0), nodes.sizes(3))
    column = nodes.add("Concat", f"{name}.sinks_shape", rows, nodes.sizes(1), axis=0)
    of_heads = nodes.add("Reshape", f"{name}.sinks_of_heads", f"{name}.sinks", nodes.sizes(1, heads, 1, 1))
    return nodes.add("Expand", f"{name}.sinks_of_rows", of_heads, column)


def attention_onnxruntime(
    nodes: Nodes, name: str, packed: str, attention: Attention, decoder: Decoder, cache: tuple[str, ...], shared: Shared
) -> str:
    """Adds an attention in GroupQueryAttention, from packed (b, s, (h + 2k) * d) to (b, s, h * d).

    It applies the rotary embeddings that the fused operator does not support, and fills up heads of sizes that the
    operator does not take with zeros.
    """
    # Prepare the heads.
    past_key, past_value, present_key, present_value = cache
    positions: Sequence[str] = ("", "", "")
    width = head_width(attention.head_dim, "onnxruntime")
    if _turns_before(attention) or width > attention.head_dim:
        packed = _prepared_heads(nodes, name, packed, attention, decoder, width, shared)
    if rotates_by_tables(attention):
        positions = (*rotary_tables(decoder.rotaries.index(attention.rotary)), "position_ids")
    # Add the operator. Empty names stand for optional inputs that are not given.
    inputs = (
        packed,
        "",
        "",
        past_key,
        past_value,
        shared["seqlens_k"],
        shared["total"],
        *positions,
        shared["bias"],
        f"{name}.sinks" if attention.sinks else "",
        *_cache_scales(nodes, name, attention, width),
        "",
        "",
        shared["query_seqlens"],
    )
    attributes = {
        "num_heads": attention.num_attention_heads,
        "kv_num_heads": attention.num_key_value_heads,
        "scale": attention.score_scale,
        "do_rotary": int(rotates_by_tables(attention)),
    }
    if attention.window is not None:
        attributes["local_window_size"] = attention.window
    if attention.softcap is not None:
        attributes["softcap"] = attention.softcap
    if cache_codes(attention, "onnxruntime") is not None:
        attributes |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
    outputs = (f"{name}.context", present_key, present_value)
    context = nodes.add_many("GroupQueryAttention", f"{name}.attend", inputs, outputs, MICROSOFT, **attributes)[0]
    # Cut the zeros off again.
    if width == attention.head_dim:
        return context
    context = nodes.add("Reshape", f"{name}.wide_heads", context, nodes.sizes(0, 0, -1, width))  # (b, s, h, width)
    bounds = (nodes.sizes(0), nodes.sizes(attention.head_dim), nodes.sizes(3))
    context = nodes.add("Slice", f"{name}.own_heads", context, *bounds)  # (b, s, h, d)
    return nodes.add("Reshape", f"{name}.joined", context, nodes.sizes(0, 0, attention.query_size))


def _cache_scales(nodes: Nodes, name: str, attention: Attention, width: int) -> tuple[str, str]:
    """Returns the names of the scales (1, k, 1, width) of keys and values; empty where the KV cache is of floats."""
    if cache_codes(attention, "onnxruntime") is None:
        return "", ""
    keys, values = (f"{name}.{part}_scale" for part in ("key", "value"))
    if width == attention.head_dim:
        return keys, values
    ends, one = nodes.sizes(0, 0, 0, 0, 0, 0, 0, width - attention.head_dim), nodes.constant("one.fp32", 1, np.float32)
    return tuple(nodes.add("Pad", f"{scale}_padded", scale, ends, one) for scale in (keys, values))


def _turns_before(attention: Attention) -> bool:
    """Returns whether queries and keys are rotated before GroupQueryAttention, which cannot do it in these sizes."""
    return attention.rotary is not None and not rotates_by_tables(attention)


def _prepared_heads(
    nodes: Nodes, name: str, packed: str, attention: Attention, decoder: Decoder, width: int, shared: Shared
) -> str:
    """Prepares the heads of packed (b, s, (h + 2k) * d) for GroupQueryAttention.

    Rotates queries and keys where the operator does not, and fills up each head with zeros to `width`. Returns
    (b, s, (h + 2k) * width).
    """
    h, k, d = attention.num_attention_heads, attention.num_key_value_heads, attention.head_dim
    heads = nodes.add("Reshape", f"{name}.split_heads", packed, nodes.sizes(0, 0, h + 2 * k, d))  # (b, s, h + 2k, d)
    if _turns_before(attention):
        inputs, outputs = (heads, nodes.sizes(h + k, k)), (f"{name}.qk", f"{name}.value")
        # (b, s, h + k, d), (b, s, k, d)
        query_key, value = nodes.add_many("Split", f"{name}.split", inputs, outputs, axis=2)
        rotated = _turned(nodes, name, query_key, attention, decoder, shared, is_primitive=True, heads_axis=2)
        heads = nodes.add("Concat", f"{name}.heads", rotated, value, axis=2)
    if width > d:
        heads = nodes.add("Pad", f"{name}.padded_heads", heads, nodes.sizes(0, 0, 0, 0, 0, 0, 0, width - d))
    return nodes.add("Reshape", f"{name}.packed", heads, nodes.sizes(0, 0, (h + 2 * k) * width))
