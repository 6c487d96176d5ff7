"""The ONNX graphs of a Decoder, written directly: small graph files beside two shared data files.

It does not know pruning or engines: widths that differ from layer to layer are plain data for it.

Inputs: input_ids, position_ids (batch, sequence) and attention_mask (batch, total) int64, 0 for left
padding; past_key_values.{i}.key|value (batch, num_key_value_heads, past, head_dim). Outputs: logits
(batch, sequence, vocabulary), present.{i}.key|value (batch, num_key_value_heads, total, head_dim);
total = past + sequence. `i` is the layer's index: a layer without attention has no KV cache, and its
number is left out.

The variants of a graph are the same model in several dialects, all on the same data files:
    opset24      RMSNormalization, RotaryEmbedding and Attention with one output. TensorScatter writes the keys
                 and values of new tokens into one buffer of the KV cache, which is bound as past and present:
                 `past` and `total`, also of attention_mask, are its capacity, a number in the graph: that of
                 max_positions. A further input says where a row's new tokens begin: write_indices (batch,)
                 int64. The buffer must hold numbers, in free slots too: these are masked, and 0 times NaN is NaN
    opset23      the same, but that the keys and values of past and new tokens are joined by Concat
    primitive    only operators of opset 17, for parsers that do not know newer ones; 19 for matrices of int8, 21 for
                 those with groups
    onnxruntime  com.microsoft.GroupQueryAttention. Where one buffer of any capacity is bound as past and
                 present of a layer, it is updated in place; `past` and `total` of the KV cache are then this
                 capacity, and the true total is the width of attention_mask, which every variant reads.
                 It needs ONNX Runtime 1.32 or newer. Where head_dim is not a multiple of 8, the KV cache
                 has zeros behind each head.
With logits `last` the last position is gathered before the final norm: logits (batch, 1, vocabulary).
A graph that reads `embeddings` has inputs_embeds (batch, sequence, hidden_size) in place of input_ids, so that
those of images can stand among those of tokens. Beside it is a graph from input_ids to the inputs_embeds of tokens.
In bf16 the logits are cast to fp32, because not every consumer has bf16. ONNX Runtime has no bf16 on a
processor: its dialect reads the same bf16 weights and computes in fp32, KV cache included.
Matrices of a weight format are read through DequantizeLinear, which ONNX Runtime and TensorRT fuse with the product.
A KV cache in a format is of its codes in the dialects that have it (nodes.cache_codes), with static scales.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edgeprune.dialects import Dialect
from edgeprune.engine.onnx.data import EMBEDDING_FILE, LAYERS_FILE, Initializer, layout, write_data
from edgeprune.engine.onnx.groups import TENSORRT
from edgeprune.engine.onnx.nodes import INPUTS, WRITE_INDICES, Nodes, element_type
from edgeprune.engine.onnx.ops import OPERATORS, Operators, add_update, linear, mlp, normed_queries_and_keys
from edgeprune.engine.onnx.ports import cache_names, cache_ports, embeddings_input, ids_input, logits_type, read_tensors
from edgeprune.engine.onnx.quantised import codes_by_name, embedded, least_opset, matrix, views
from edgeprune.errors import InputError
from edgeprune.model.decoder import Decoder, Layer
from edgeprune.ondevice.onnxruntime import ROW_LENGTHS
from edgeprune.precision import GraphPrecision

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto

    from edgeprune.model.model import StoredWeights


@dataclass(frozen=True)
class GraphVariant:
    """A dialect, the positions that the graph gives logits of, and whether it reads tokens or what embeds them."""

    dialect: Dialect
    logits: Literal["all", "last"]
    reads: Literal["tokens", "embeddings"] = "tokens"

    @property
    def filename(self) -> str:
        """Returns the name of the variant's graph file."""
        reads = "" if self.reads == "tokens" else ".embeddings"
        return f"model{_suffix(self.dialect)}{reads}{'.last' if self.logits == 'last' else ''}.onnx"

    @property
    def embedding_filename(self) -> str:
        """Returns the name of the file of the graph that embeds the tokens for a variant that reads embeddings."""
        return f"embedding{_suffix(self.dialect)}.onnx"


def _suffix(dialect: Dialect) -> str:
    return "" if dialect == "opset23" else f".{dialect}"


ONNXRUNTIME_GRAPH = GraphVariant("onnxruntime", "last")
_ENDLESS = 2**31 - 1  # an end of a slice, beyond every length


@dataclass(frozen=True)
class GraphFiles:
    """The files of a model's graphs: the graph of each variant, and the bytes of each data file."""

    graphs: dict[GraphVariant, Path]
    data: dict[Path, int]


def write_graphs(
    decoder: Decoder,
    weights: StoredWeights,
    folder: Path,
    precision: GraphPrecision,
    variants: Sequence[GraphVariant],
    max_positions: int | None = None,
) -> GraphFiles:
    """Writes the variants of a graph and their data files into `folder`; equal input gives equal bytes.

    weights: by the names of decoder.py, any floating type, or codes for the names of decoder.weight_formats; each is
    read once. precision: of all other weights, scales, activations, KV cache and logits, for bf16 as above (sums of
    squares stay in fp32). max_positions: the longest context to serve, which is the rows of the onnxruntime dialect's
    rotary tables and the capacity of opset24's KV cache; at most and by default decoder.max_position_embeddings.
    Returns the files. Raises InputError for a missing weight, a wrong shape or format, and NumericalError for a weight
    that is not finite in this precision; the files are then incomplete.
    """
    # The data files come first: the graphs refer to offsets in them.
    tables = any(variant.dialect == "onnxruntime" for variant in variants)
    context = _longest_context(decoder, max_positions)
    initializers = layout(decoder, precision, context if tables else None)
    folder.mkdir(parents=True, exist_ok=True)
    write_data(decoder, weights, folder, initializers)
    # One graph file for each variant.
    graphs = {variant: folder / variant.filename for variant in variants}
    for variant, path in graphs.items():
        model = _model(decoder, precision, variant, initializers, functools.partial(_graph, context=context))
        path.write_bytes(model.SerializeToString(deterministic=True))
        if variant.reads == "embeddings":
            model = _model(decoder, precision, variant, initializers, _embedding_graph)
            (folder / variant.embedding_filename).write_bytes(model.SerializeToString(deterministic=True))
    names = (EMBEDDING_FILE, LAYERS_FILE)
    return GraphFiles(graphs, {folder / name: (folder / name).stat().st_size for name in names})


def graph_weight_bytes(
    decoder: Decoder, precision: GraphPrecision, dialect: Dialect = "opset23", max_positions: int | None = None
) -> int:
    """Returns the bytes of all initializers that a graph of this dialect refers to, without writing it.

    The onnxruntime dialect may add rotary tables. Padding between initializers is not counted.
    """
    rows = _longest_context(decoder, max_positions) if dialect == "onnxruntime" else None
    return sum(initializer.length for initializer in layout(decoder, precision, rows))


def _longest_context(decoder: Decoder, max_positions: int | None) -> int:
    """Returns the longest context that a graph serves; raises InputError where max_positions is less than 1."""
    if max_positions is None:
        return decoder.max_position_embeddings
    if max_positions < 1:
        raise InputError(f"max_positions is {max_positions}, less than 1", "Give the longest context to serve.")
    return min(max_positions, decoder.max_position_embeddings)


def _model(
    decoder: Decoder,
    precision: GraphPrecision,
    variant: GraphVariant,
    initializers: Sequence[Initializer],
    graph_of: Callable[[Nodes, Decoder, GraphVariant, Sequence[Initializer]], GraphProto],
) -> ModelProto:
    """Returns the ONNX model of a variant with the graph that `graph_of` makes."""
    from onnx import helper

    tensors = [*initializers, *views(initializers, variant.dialect)]
    quantised = codes_by_name(tensors)
    # The opset is the least that operators and weight formats need.
    opsets = dict(OPERATORS[variant.dialect].opsets)
    opsets[""] = max(opsets[""], *map(least_opset, quantised.values()), 0)
    # ONNX Runtime computes bf16 weights in fp32 on a processor.
    computed: GraphPrecision = "fp32" if (precision, variant.dialect) == ("bf16", "onnxruntime") else precision
    if any(codes.form.e4m3_scales for codes in quantised.values()) and variant.dialect != "onnxruntime":
        opsets[TENSORRT] = 1
    nodes = Nodes(computed, opsets[""], variant.dialect, quantised, INPUTS[variant.reads])
    graph = graph_of(nodes, decoder, variant, tensors)
    imports = [helper.make_opsetid(domain, version) for domain, version in opsets.items()]
    model = helper.make_model(
        graph,
        opset_imports=imports,
        ir_version=helper.find_min_ir_version_for(imports, ignore_unknown=True),
        producer_name="edgeprune",
    )
    if variant.dialect == "onnxruntime":
        helper.set_model_props(model, {ROW_LENGTHS: "1"})
    return model


def _graph(
    nodes: Nodes, decoder: Decoder, variant: GraphVariant, tensors: Sequence[Initializer], context: int
) -> GraphProto:
    """Returns the graph of a variant, with inputs, outputs, nodes and those of the tensors that these read."""
    from onnx import TensorProto, helper

    # Build the nodes.
    element = element_type(nodes.precision)
    logits = _forward(nodes, decoder, variant)
    external, widened = read_tensors(nodes, tensors, element)
    # Declare inputs and outputs.
    rows = "sequence" if variant.logits == "all" else 1
    # The lengths of the cache before and after a step.
    past, total = (context, context) if variant.dialect == "opset24" else ("past", "total")
    inputs, outputs = cache_ports(decoder, element, variant.dialect, past, total)
    if variant.dialect == "opset24":
        inputs.append(helper.make_tensor_value_info(WRITE_INDICES, TensorProto.INT64, ["batch"]))
    return helper.make_graph(
        [*widened, *nodes.nodes],
        decoder.family or "decoder",
        [
            embeddings_input(decoder, element) if variant.reads == "embeddings" else ids_input(),
            helper.make_tensor_value_info("position_ids", TensorProto.INT64, ["batch", "sequence"]),
            helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", total]),
            *inputs,
        ],
        [helper.make_tensor_value_info(logits, logits_type(element), ["batch", rows, decoder.vocab_size]), *outputs],
        [*external, *nodes.constants.values()],
    )


def _embedding_graph(
    nodes: Nodes, decoder: Decoder, variant: GraphVariant, tensors: Sequence[Initializer]
) -> GraphProto:
    """Returns the graph from input_ids to inputs_embeds, what the graph of a variant reads."""
    from onnx import helper

    element, name = element_type(nodes.precision), INPUTS["embeddings"]
    head = matrix(nodes, "head.weight") if decoder.tie_word_embeddings else ""
    nodes.add("Identity", name, _embed(nodes, decoder, head, variant))
    external, widened = read_tensors(nodes, tensors, element)
    return helper.make_graph(
        [*widened, *nodes.nodes],
        f"{decoder.family or 'decoder'}.embedding",
        [ids_input()],
        [embeddings_input(decoder, element)],
        [*external, *nodes.constants.values()],
    )


@dataclass
class _Stream:
    """The residual stream while the graph grows.

    hidden: the name of the stream (b, s, c); update: the name of what a module adds to it (b, s, c). The addition is
    left to the next norm, because some dialects fuse the two.
    """

    nodes: Nodes
    decoder: Decoder
    operators: Operators
    hidden: str
    update: str | None = None

    def settled(self) -> str:
        """Adds the pending update, if any, and returns the name of the stream."""
        self.hidden, self.update = add_update(self.nodes, self.hidden, self.update), None
        return self.hidden

    def normed(self, name: str) -> str:
        """Adds the pending update, if any, and returns the name of the normed stream."""
        norm = self.operators.norm(self.decoder)
        self.hidden, x = norm(self.nodes, name, self.hidden, self.update, f"{name}.weight", self.decoder.norm_eps)
        self.update = None
        return x

    def read(self, name: str) -> str:
        """Returns the name of what a module reads: the stream, normed unless norms come after the modules alone."""
        return self.settled() if self.decoder.norms == "after" else self.normed(f"{name}.norm")

    def output(self, name: str, raw: str) -> str:
        """Returns the name of what a module adds to the stream: its output, normed unless norms come before alone."""
        if self.decoder.norms == "before":
            return raw
        norm = self.operators.norm(self.decoder)
        name = f"{name}.post_norm"
        return norm(self.nodes, name, raw, None, f"{name}.weight", self.decoder.norm_eps)[1]

    def add(self, update: str) -> None:
        """Leaves an update to the next norm, together with one that is pending already."""
        if self.update is not None:
            update = self.nodes.add("Add", f"{update}.both", self.update, update)
        self.update = update


def _forward(nodes: Nodes, decoder: Decoder, variant: GraphVariant) -> str:
    """Adds the nodes of the whole decoder; returns the name of the logits."""
    # Masks, angles and lengths are made once, for all layers.
    operators = OPERATORS[variant.dialect]
    attends = any(layer.attention is not None for layer in decoder.layers)
    shared = operators.prepare(nodes, decoder) if attends else {}
    head = matrix(nodes, "head.weight")  # before all else, because a tied embedding reads it too
    hidden = nodes.read if variant.reads == "embeddings" else _embed(nodes, decoder, head, variant)
    stream = _Stream(nodes, decoder, operators, _placed(nodes, decoder, hidden))
    for index, layer in enumerate(decoder.layers):
        # Parallel modules read the same stream, so that their updates are added after both.
        if decoder.parallel:
            stream.settled()
        updates = []
        for kind in ("attention", "mlp"):
            if getattr(layer, kind) is None:
                continue
            name = f"layers.{index}.{kind}"
            x = stream.read(name)
            updates.append(stream.output(name, _module(stream, kind, name, x, layer, index, shared)))
            if not decoder.parallel:
                stream.add(updates.pop())
        for update in updates:
            stream.add(update)
    # The last position alone is normed and multiplied with the head.
    if variant.logits == "last":
        take_last = _last_position(nodes, variant)
        stream.hidden = take_last("last.hidden", stream.hidden)  # (b, 1, c)
        if stream.update is not None:
            stream.update = take_last("last.update", stream.update)
    return _logits(nodes, decoder, stream.normed("norm"), head)


def _last_position(nodes: Nodes, variant: GraphVariant) -> Callable[[str, str], str]:
    """Returns a function that adds the last position (b, 1, c) of a value (b, s, c), with a name for the result."""
    # TensorRT's builder dequantises a head before a product that it knows to have a single row (RTX 1.7). So it must
    # not know: a slice takes the last (s + 2) / (s + 1) positions, which is 1, but not by the bounds of s alone.
    if "head.weight" in nodes.quantised and variant.dialect != "onnxruntime":
        shape = nodes.add("Shape", "last.ids_shape", nodes.read)
        sequence = nodes.add("Slice", "last.sequence", shape, nodes.sizes(1), nodes.sizes(2))
        dividend = nodes.add("Add", "last.dividend", sequence, nodes.sizes(2))
        divisor = nodes.add("Add", "last.divisor", sequence, nodes.sizes(1))
        start = nodes.add("Sub", "last.start", sequence, nodes.add("Div", "last.rows", dividend, divisor))
        bounds = (start, nodes.sizes(_ENDLESS), nodes.sizes(1))
        return lambda name, value: nodes.add("Slice", name, value, *bounds)
    position = nodes.constant("last.position", [-1])
    return lambda name, value: nodes.add("Gather", name, value, position, axis=1)


def _module(stream: _Stream, kind: str, name: str, x: str, layer: Layer, index: int, shared: dict[str, str]) -> str:
    """Adds the nodes of a module; returns the name of its output projection's output (b, s, c)."""
    nodes, decoder, operators = stream.nodes, stream.decoder, stream.operators
    if kind == "mlp":
        return mlp(nodes, operators, name, x, layer.mlp)
    # (b, s, (h + 2k) * d), queries, keys and values behind each other
    attention = layer.attention
    packed = linear(nodes, f"{name}.qkv", x, f"{name}.qkv", attention.input_bias)
    if attention.qk_norm is not None:
        packed = normed_queries_and_keys(nodes, operators, name, packed, attention, decoder.norm_eps)
    context = operators.attention(nodes, name, packed, attention, decoder, cache_names(index), shared)
    # context: (b, s, h * d)
    return linear(nodes, f"{name}.o", context, f"{name}.o", attention.output_bias)


def _logits(nodes: Nodes, decoder: Decoder, x: str, head: str) -> str:
    """Adds the nodes of the head, from x (b, s, c); returns the name of the logits (b, s, vocab_size)."""
    # Scale and softcap: cap * tanh(scale * logits / cap).
    steps = []
    if decoder.logits_scale != 1.0:
        steps.append(("Mul", decoder.logits_scale))
    if (cap := decoder.logits_softcap) is not None:
        steps += [("Mul", 1 / cap), ("Tanh", None), ("Mul", cap)]
    # The last step bears the output's name, unless a cast follows.
    last = "logits.bf16" if nodes.precision == "bf16" else "logits"
    names = [f"head.{index}" for index in range(len(steps))] + [last]
    (value,) = nodes.add_many("MatMul", "head", (x, head), (names[0],))
    for (operator, number), name in zip(steps, names[1:], strict=True):
        inputs = (value,) if number is None else (value, nodes.number(f"number.{number}", number))
        (value,) = nodes.add_many(operator, f"{name}.step", inputs, (name,))
    return nodes.to_fp32("logits", value) if value != "logits" else value


def _embed(nodes: Nodes, decoder: Decoder, head: str, variant: GraphVariant) -> str:
    """Adds the nodes of the embedding of tokens, from input_ids (b, s); returns its name (b, s, c).

    A tied embedding gathers columns of the head, so that it is stored only once.
    """
    if decoder.embedding_format is not None and variant.dialect == "onnxruntime":
        hidden = embedded(nodes, "embedding.weight", "input_ids")
    elif decoder.tie_word_embeddings:
        columns = nodes.add("Gather", "embedding.columns", head, "input_ids", axis=1)  # (c, b, s)
        hidden = nodes.add("Transpose", "embedding", columns, perm=[1, 2, 0])
    else:
        hidden = nodes.add("Gather", "embedding", matrix(nodes, "embedding.weight"), "input_ids", axis=0)
    if decoder.embedding_scale != 1.0:
        scale = nodes.number("embedding.scale", decoder.embedding_scale)
        hidden = nodes.add("Mul", "embedding.scaled", hidden, scale)
    return hidden


def _placed(nodes: Nodes, decoder: Decoder, hidden: str) -> str:
    """Adds the learned positions, if any, to embeddings (b, s, c); returns the name of the stream."""
    if decoder.learned_positions:
        positions = nodes.add("Gather", "positions", "positions.weight", "position_ids", axis=0)
        hidden = nodes.add("Add", "embedding.placed", hidden, positions)
    return hidden
