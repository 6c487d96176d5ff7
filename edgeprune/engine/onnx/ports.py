"""The declarations of a graph: its inputs and outputs, and those initializers of the data files that its nodes read.

It does not know the nodes of a decoder's modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgeprune.dialects import Dialect
from edgeprune.engine.onnx.data import SCALES, Initializer
from edgeprune.engine.onnx.nodes import INPUTS, Nodes, cache_codes, head_width
from edgeprune.model.decoder import Decoder

if TYPE_CHECKING:
    from onnx import NodeProto, TensorProto, ValueInfoProto


def read_tensors(
    nodes: Nodes, tensors: Sequence[Initializer], element: int
) -> tuple[list[TensorProto], list[NodeProto]]:
    """Returns those of the tensors that nodes read, and casts of the floats among them that are stored in another type
    than `element`."""
    used = {name for node in nodes.nodes for name in node.input}
    external, widened = [], []
    for initializer in tensors:
        if initializer.name in used:
            external.append(_external(initializer))
            if initializer.role in ("values", *SCALES) and external[-1].data_type != element:
                widened.append(_widened(external[-1], element))
    return external, widened


def ids_input() -> ValueInfoProto:
    """Returns the input of tokens (batch, sequence)."""
    from onnx import TensorProto, helper

    return helper.make_tensor_value_info(INPUTS["tokens"], TensorProto.INT64, ["batch", "sequence"])


def embeddings_input(decoder: Decoder, element: int) -> ValueInfoProto:
    """Returns the input, or output, of what embeds tokens, (batch, sequence, hidden_size)."""
    from onnx import helper

    return helper.make_tensor_value_info(INPUTS["embeddings"], element, ["batch", "sequence", decoder.hidden_size])


def cache_ports(
    decoder: Decoder, element: int, dialect: Dialect, past: int | str, total: int | str
) -> tuple[list[ValueInfoProto], list[ValueInfoProto]]:
    """Returns the inputs and outputs of the KV cache, a key and a value of each for every layer with attention.

    past, total: the tokens of inputs and outputs, as a number or by name.
    """
    from onnx import TensorProto, helper

    inputs, outputs = [], []
    for index, layer in enumerate(decoder.layers):
        if (attention := layer.attention) is None:
            continue
        heads, width = attention.num_key_value_heads, head_width(attention.head_dim, dialect)
        codes = cache_codes(attention, dialect)
        held = element if codes is None else getattr(TensorProto, codes.onnx_type)
        past_key, past_value, present_key, present_value = cache_names(index)
        for name in (past_key, past_value):
            inputs.append(helper.make_tensor_value_info(name, held, ["batch", heads, past, width]))
        for name in (present_key, present_value):
            outputs.append(helper.make_tensor_value_info(name, held, ["batch", heads, total, width]))
    return inputs, outputs


def cache_names(index: int) -> tuple[str, str, str, str]:
    """Returns the names of a layer's past key, past value, present key and present value."""
    past, present = f"past_key_values.{index}", f"present.{index}"
    return f"{past}.key", f"{past}.value", f"{present}.key", f"{present}.value"


def _external(initializer: Initializer) -> TensorProto:
    """Returns the ONNX tensor that refers to an initializer's bytes in its data file."""
    from onnx import TensorProto

    element = getattr(TensorProto, initializer.onnx_type)
    tensor = TensorProto(name=initializer.name, data_type=element, dims=initializer.shape)
    tensor.data_location = TensorProto.EXTERNAL
    entries = {"location": initializer.file, "offset": initializer.offset, "length": initializer.length}
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def logits_type(element: int) -> int:
    """Returns ONNX's number of the type of the logits: fp32 for bf16."""
    from onnx import TensorProto

    return TensorProto.FLOAT if element == TensorProto.BFLOAT16 else element


def _widened(tensor: TensorProto, element: int) -> NodeProto:
    """Returns the node that casts an initializer, which gets another name, so that the cast bears its own."""
    from onnx import helper

    name, tensor.name = tensor.name, f"{tensor.name}.stored"
    return helper.make_node("Cast", [tensor.name], [name], f"{name}.widened", to=element)
