"""The nodes of one graph while it grows, and the values that all its layers read.

It does not know the modules of a decoder. Notation as in ops.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from edgeprune.dialects import Dialect
from edgeprune.engine.onnx.data import Initializer
from edgeprune.model.decoder import Attention
from edgeprune.precision import PRECISIONS, CacheFormat, GraphPrecision

if TYPE_CHECKING:
    from onnx import NodeProto, TensorProto

WRITE_INDICES = "write_indices"  # an input of opset24: the slot of the cache that a row's first new token gets
INPUTS = {"tokens": "input_ids", "embeddings": "inputs_embeds"}
"""The names of the input of a graph that reads tokens (batch, sequence), or what embeds them, (batch, sequence,
hidden_size)."""
MICROSOFT = "com.microsoft"
HEAD_MULTIPLE = 8  # GroupQueryAttention takes heads whose sizes are multiples of it
Shared = dict[str, str]  # values made once and read by every layer: masks, angles, lengths


def head_width(head_dim: int, dialect: Dialect) -> int:
    """Returns the width of one head in a dialect's KV cache, where zeros may fill it up."""
    multiple = HEAD_MULTIPLE if dialect == "onnxruntime" else 1
    return -(-head_dim // multiple) * multiple


def cache_codes(attention: Attention, dialect: Dialect) -> CacheFormat | None:
    """Returns the format of an attention's KV cache in a dialect; None: floats.

    Q/DQ stand around a concatenation, so opset23 has them all; the operator of ONNX Runtime has int8 alone (1.32).
    """
    form = attention.cache_format
    has_it = dialect == "opset23" or (dialect == "onnxruntime" and form is not None and form.name == "int8")
    return form if has_it else None


def element_type(precision: GraphPrecision) -> int:
    """Returns ONNX's number of the type of weights, activations and KV cache."""
    from onnx import TensorProto

    return getattr(TensorProto, PRECISIONS[precision].onnx_type)


@dataclass
class Nodes:
    """The nodes and small constants of one graph while it grows, in execution order.

    quantised: the codes of each matrix that is stored in a weight format, by the name of the matrix; read: the name of
    the input that the sequence comes in.
    """

    precision: GraphPrecision  # of weights, activations and KV cache
    opset: int = 17
    dialect: Dialect = "opset23"
    quantised: Mapping[str, Initializer] = field(default_factory=dict)
    read: str = INPUTS["tokens"]
    nodes: list[NodeProto] = field(default_factory=list)
    constants: dict[str, TensorProto] = field(default_factory=dict)

    def add(self, operator: str, name: str, *inputs: str, domain: str = "", **attributes: object) -> str:
        """Adds a node with one output, and returns the output's name, which is the node's."""
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
        """Adds a node, and returns its outputs' names; an empty name leaves out an optional output."""
        from onnx import helper

        self.nodes.append(helper.make_node(operator, inputs, outputs, name, domain=domain or None, **attributes))
        return outputs

    def once(self, name: str, add: Callable[[str], str]) -> str:
        """Adds a value by `add`, which is given its name, unless a node makes it already; returns the name."""
        return name if any(node.name == name for node in self.nodes) else add(name)

    def constant(self, name: str, value: object, dtype: type[np.generic] = np.int64) -> str:
        """Adds a small constant inside the graph file, once for each name, and returns the name."""
        from onnx import numpy_helper

        if name not in self.constants:
            self.constants[name] = numpy_helper.from_array(np.asarray(value, dtype), name)
        return name

    def number(self, name: str, value: float | Sequence[float]) -> str:
        """Adds a constant of the graph's own precision, or a vector, once for each name, and returns the name."""
        from onnx import helper

        if name not in self.constants:
            values = [value] if isinstance(value, (int, float)) else value
            shape = () if values is not value else (len(values),)
            self.constants[name] = helper.make_tensor(name, element_type(self.precision), shape, values)
        return name

    def zero(self, onnx_type: str) -> str:
        """Adds the code of 0.0 in a type of ONNX, once for each, and returns its name."""
        from onnx import TensorProto, helper

        name = f"zero.{onnx_type.lower()}"
        if name not in self.constants:
            self.constants[name] = helper.make_tensor(name, getattr(TensorProto, onnx_type), (), [0])
        return name

    def sizes(self, *values: int) -> str:
        """Adds sizes, or indices, as an int64 vector (values,), and returns its name."""
        return self.constant("sizes." + "_".join(map(str, values)), values)

    def to_fp32(self, name: str, value: str) -> str:
        """Adds a cast to fp32, where the graph has another precision, and returns the result's name."""
        from onnx import TensorProto

        return value if self.precision == "fp32" else self.add("Cast", name, value, to=TensorProto.FLOAT)

    def from_fp32(self, name: str, value: str) -> str:
        """Adds a cast from fp32 to the graph's precision, where it is another, and returns the result's name."""
        return value if self.precision == "fp32" else self.add("Cast", name, value, to=element_type(self.precision))


def lengths(nodes: Nodes) -> Shared:
    """Adds batch, sequence and total as int64 vectors of one element."""
    shape = nodes.add("Shape", "sequence.ids_shape", nodes.read)
    sequence = nodes.add("Slice", "sequence", shape, nodes.sizes(1), nodes.sizes(2))
    shape = nodes.add("Shape", "total.mask_shape", "attention_mask")
    batch = nodes.add("Slice", "batch", shape, nodes.sizes(0), nodes.sizes(1))
    total = nodes.add("Slice", "total", shape, nodes.sizes(1), nodes.sizes(2))
    return {"batch": batch, "sequence": sequence, "total": total}


def masked(nodes: Nodes) -> str:
    """Adds the value that a mask adds to the score of a masked pair, and returns its name.

    It is far below any score, and stays finite when a score is added, so that a row that attends to nothing (left
    padding) gives numbers and not NaN.
    """
    least = np.finfo(np.float16 if nodes.precision == "fp16" else np.float32).min
    return nodes.number("mask.minimum", float(least) / 2)


def additive_masks(nodes: Nodes, windows: tuple[int | None, ...], in_place: bool = False) -> Shared:
    """Adds the masks (b, 1, s, t) of these windows, by `mask.{window}`: 0 where the query may see the key.

    It may where the key is a real token, is not later than the query and, with a window, is less than so many
    positions before it. in_place: t is the capacity of the KV cache, whose free slots count as later.
    """
    # The positions of keys and queries in the KV cache.
    sizes = lengths(nodes)
    zero, one = nodes.constant("zero", 0), nodes.constant("one", 1)
    total = nodes.add("Squeeze", "mask.total", sizes["total"], nodes.sizes(0))
    sequence = nodes.add("Squeeze", "mask.sequence", sizes["sequence"], nodes.sizes(0))
    keys = nodes.add("Range", "mask.keys", zero, total, one)  # (t,)
    if in_place:
        new = nodes.add("Range", "mask.new", zero, sequence, one)
        new = nodes.add("Unsqueeze", "mask.new_rows", new, nodes.sizes(1))  # (s, 1)
        begin = nodes.add("Unsqueeze", "mask.begin", WRITE_INDICES, nodes.sizes(1, 2, 3))  # (b, 1, 1, 1)
        queries = nodes.add("Add", "mask.queries", begin, new)  # (b, 1, s, 1)
    else:
        past = nodes.add("Sub", "mask.past", total, sequence)
        queries = nodes.add("Range", "mask.query_range", past, total, one)
        queries = nodes.add("Unsqueeze", "mask.queries", queries, nodes.sizes(1))  # (s, 1)
    # Keys that are not later, and keys that are real tokens.
    causal = nodes.add("LessOrEqual", "mask.causal", keys, queries)  # (s, t) or (b, 1, s, t)
    real = nodes.add("Greater", "mask.real_tokens", "attention_mask", zero)
    real = nodes.add("Unsqueeze", "mask.real", real, nodes.sizes(1, 2))  # (b, 1, 1, t)
    # One mask for each window.
    masks = {}
    for window in windows:
        name, near = f"mask.{window}", causal
        if window is not None:
            first = nodes.add("Sub", f"{name}.first", queries, nodes.constant(f"{name}.size", window))
            near = nodes.add("And", f"{name}.near", causal, nodes.add("Greater", f"{name}.recent", keys, first))
        seen = nodes.add("And", f"{name}.seen", near, real)
        masks[name] = nodes.add("Where", name, seen, nodes.number("mask.zero", 0.0), masked(nodes))
    return masks
