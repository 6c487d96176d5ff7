"""Decoder and weights -> ONNX, written directly: small graph files beside two shared data files.

Inputs: input_ids, position_ids (batch, sequence) and attention_mask (batch, total) int64, 0 for left
padding; past_key_values.{i}.key|value (batch, num_key_value_heads, past, head_dim). Outputs: logits
(batch, sequence, vocabulary), present.{i}.key|value (batch, num_key_value_heads, total, head_dim);
total = past + sequence. `i` is the layer's index: a layer without attention has no cache, and its
number is left out. Per-layer widths are plain data here. It knows nothing about pruning or engines.

Spellings are one model in several sets of operators, all on the same data files:
    opset23      RMSNormalization, RotaryEmbedding, Attention with one output, the cache outside
    primitive    operators of opset 17 only, for parsers that know no newer ones
    onnxruntime  com.microsoft.GroupQueryAttention. Bind one buffer of any capacity as past and present
                 of a layer and it is updated in place; `past` and `total` of the cache are then that
                 capacity and the true total comes from attention_mask's width, which every spelling reads.
                 Needs ONNX Runtime 1.32 or newer and a head_dim that is a multiple of 16.
With logits `last` the last position is gathered before the final norm: logits (batch, 1, vocabulary).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from edgeprune.engine import graph_data
from edgeprune.engine.graph_data import Initializer, Precision
from edgeprune.engine.graph_ops import OPERATORS, Dialect, Nodes, mlp
from edgeprune.errors import InputError
from edgeprune.model.decoder import Decoder

if TYPE_CHECKING:
    import torch
    from onnx import GraphProto, ModelProto, TensorProto, ValueInfoProto


@dataclass(frozen=True)
class Spelling:
    dialect: Dialect
    logits: Literal["all", "last"]

    @property
    def filename(self) -> str:
        dialect = "" if self.dialect == "opset23" else f".{self.dialect}"
        return f"model{dialect}{'.last' if self.logits == 'last' else ''}.onnx"


@dataclass(frozen=True)
class GraphFiles:
    """What was written: the graph of each spelling, and the bytes of each data file."""

    graphs: dict[Spelling, Path]
    data: dict[Path, int]


def write_graphs(
    decoder: Decoder,
    weights: Mapping[str, torch.Tensor],
    folder: Path,
    precision: Precision,
    spellings: Sequence[Spelling],
    max_positions: int | None = None,
) -> GraphFiles:
    """Write the spellings and their data files into `folder`; equal input gives equal bytes.

    weights: by the names of decoder.py, any floating type; each is read once. precision is that of
    weights, activations, cache and logits (sums of squares stay fp32). max_positions: rows of the
    onnxruntime dialect's rotary tables, at most and by default decoder.max_position_embeddings; longer
    contexts need no tables in the other dialects.
    Raises InputError for a decoder that a dialect cannot spell, a missing weight or a wrong shape, and
    NumericalError for a weight that is not finite in this precision; files begun are then incomplete.
    """
    _check_rotary(decoder)
    for spelling in spellings:
        if (reason := unsupported(decoder, spelling.dialect)) is not None:
            raise InputError(reason, "Use another dialect: opset23 or primitive.")
    tables = any(spelling.dialect == "onnxruntime" for spelling in spellings)
    initializers = graph_data.layout(decoder, precision, _table_rows(decoder, max_positions) if tables else None)
    folder.mkdir(parents=True, exist_ok=True)
    graph_data.write_data(decoder, weights, folder, precision, initializers)
    graphs = {spelling: folder / spelling.filename for spelling in spellings}
    for spelling, path in graphs.items():
        model = _model(decoder, precision, spelling, initializers)
        path.write_bytes(model.SerializeToString(deterministic=True))
    names = (graph_data.EMBEDDING_FILE, graph_data.LAYERS_FILE)
    return GraphFiles(graphs, {folder / name: (folder / name).stat().st_size for name in names})


def graph_weight_bytes(
    decoder: Decoder, precision: Precision, dialect: Dialect = "opset23", max_positions: int | None = None
) -> int:
    """Bytes of all initializers that a graph of this dialect references, without writing it.

    The onnxruntime dialect adds two rotary tables; padding between initializers is not counted.
    """
    rows = _table_rows(decoder, max_positions) if dialect == "onnxruntime" else None
    return sum(initializer.length for initializer in graph_data.layout(decoder, precision, rows))


def unsupported(decoder: Decoder, dialect: Dialect) -> str | None:
    """Why this dialect cannot spell the decoder though others can; None if it can."""
    if dialect != "onnxruntime":
        return None
    for index, layer in enumerate(decoder.layers):
        if layer.attention is not None and layer.attention.head_dim % 16 != 0:
            return (
                f"layer {index} has head_dim {layer.attention.head_dim}, not the multiple of 16 "
                "that ONNX Runtime's GroupQueryAttention requires"
            )
    return None


def _check_rotary(decoder: Decoder) -> None:
    turned = 2 * len(decoder.rotary.inverse_frequencies)
    for index, layer in enumerate(decoder.layers):
        if layer.attention is not None and layer.attention.head_dim != turned:
            raise InputError(
                f"layer {index} has head_dim {layer.attention.head_dim}, its rotary embedding turns {turned} of it",
                "Use a model whose rotary embedding turns whole heads.",
            )


def _table_rows(decoder: Decoder, max_positions: int | None) -> int:
    if max_positions is None:
        return decoder.max_position_embeddings
    if max_positions < 1:
        raise InputError(f"max_positions is {max_positions}, less than 1", "Give the longest context to serve.")
    return min(max_positions, decoder.max_position_embeddings)


def _model(
    decoder: Decoder, precision: Precision, spelling: Spelling, initializers: Sequence[Initializer]
) -> ModelProto:
    from onnx import helper

    operators = OPERATORS[spelling.dialect]
    return helper.make_model(
        _graph(decoder, precision, spelling, initializers),
        opset_imports=[helper.make_opsetid(domain, version) for domain, version in operators.opsets.items()],
        ir_version=operators.ir_version,
        producer_name="edgeprune",
    )


def _graph(
    decoder: Decoder, precision: Precision, spelling: Spelling, initializers: Sequence[Initializer]
) -> GraphProto:
    from onnx import TensorProto, helper

    element = TensorProto.FLOAT16 if precision == "fp16" else TensorProto.FLOAT
    nodes = Nodes(np.float16 if precision == "fp16" else np.float32)
    logits = _forward(nodes, decoder, spelling)
    used = {name for node in nodes.nodes for name in node.input}
    external = [_external(initializer, element) for initializer in initializers if initializer.name in used]
    rows = "sequence" if spelling.logits == "all" else 1
    inputs, outputs = _caches(decoder, element)
    return helper.make_graph(
        nodes.nodes,
        decoder.family or "decoder",
        [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"]),
            helper.make_tensor_value_info("position_ids", TensorProto.INT64, ["batch", "sequence"]),
            helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "total"]),
            *inputs,
        ],
        [helper.make_tensor_value_info(logits, element, ["batch", rows, decoder.vocab_size]), *outputs],
        [*external, *nodes.constants.values()],
    )


def _caches(decoder: Decoder, element: int) -> tuple[list[ValueInfoProto], list[ValueInfoProto]]:
    from onnx import helper

    inputs, outputs = [], []
    for index, layer in enumerate(decoder.layers):
        if (attention := layer.attention) is None:
            continue
        heads, width = attention.num_key_value_heads, attention.head_dim
        past_key, past_value, present_key, present_value = _cache_names(index)
        for name in (past_key, past_value):
            inputs.append(helper.make_tensor_value_info(name, element, ["batch", heads, "past", width]))
        for name in (present_key, present_value):
            outputs.append(helper.make_tensor_value_info(name, element, ["batch", heads, "total", width]))
    return inputs, outputs


def _cache_names(index: int) -> tuple[str, str, str, str]:
    past, present = f"past_key_values.{index}", f"present.{index}"
    return f"{past}.key", f"{past}.value", f"{present}.key", f"{present}.value"


def _external(initializer: Initializer, element: int) -> TensorProto:
    from onnx import TensorProto

    tensor = TensorProto(name=initializer.name, data_type=element, dims=initializer.shape)
    tensor.data_location = TensorProto.EXTERNAL
    entries = {"location": initializer.file, "offset": initializer.offset, "length": initializer.length}
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def _forward(nodes: Nodes, decoder: Decoder, spelling: Spelling) -> str:
    """All layers, from input_ids to the name of the logits. `update` is what a half layer adds to the
    residual stream; adding it is left to the next norm, which some dialects fuse with it."""
    operators, eps = OPERATORS[spelling.dialect], decoder.norm_eps
    attends = any(layer.attention is not None for layer in decoder.layers)
    shared = operators.prepare(nodes, decoder) if attends else {}
    hidden, update = _embed(nodes, decoder), None
    for index, layer in enumerate(decoder.layers):
        if layer.attention is not None:
            name = f"layers.{index}.attention"
            hidden, x = operators.norm(nodes, f"{name}.norm", hidden, update, f"{name}.norm.weight", eps)
            packed = nodes.add("MatMul", f"{name}.qkv", x, f"{name}.qkv.weight")
            context = operators.attention(nodes, name, packed, layer.attention, _cache_names(index), shared)
            update = nodes.add("MatMul", f"{name}.o", context, f"{name}.o.weight")
        if layer.mlp is not None:
            name = f"layers.{index}.mlp"
            hidden, x = operators.norm(nodes, f"{name}.norm", hidden, update, f"{name}.norm.weight", eps)
            update = mlp(nodes, name, x, layer.mlp.intermediate_size)
    if spelling.logits == "last":
        position = nodes.constant("last.position", [-1])
        hidden = nodes.add("Gather", "last.hidden", hidden, position, axis=1)  # (b, 1, c)
        update = update and nodes.add("Gather", "last.update", update, position, axis=1)
    _, x = operators.norm(nodes, "norm", hidden, update, "norm.weight", eps)
    (logits,) = nodes.add_many("MatMul", "head", (x, "head.weight"), ("logits",))
    return logits


def _embed(nodes: Nodes, decoder: Decoder) -> str:
    """(b, s) ids -> (b, s, c). A tied embedding gathers the head's columns, so that it is stored once."""
    if not decoder.tie_word_embeddings:
        return nodes.add("Gather", "embedding", "embedding.weight", "input_ids", axis=0)
    columns = nodes.add("Gather", "embedding.columns", "head.weight", "input_ids", axis=1)  # (c, b, s)
    return nodes.add("Transpose", "embedding", columns, perm=[1, 2, 0])
