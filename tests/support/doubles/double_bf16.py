"""bf16 on a processor that has none: a graph that computes in fp32 and rounds what every node gives to bf16.

ONNX Runtime's processor kernels know bf16 in Cast alone; so each output is cast there and back.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper

BF16 = TensorProto.BFLOAT16


def widened(stored: np.ndarray) -> np.ndarray:
    """The bits of bf16 numbers, uint16, as fp32."""
    return (stored.astype(np.uint32) << 16).view(np.float32)


def narrowed(values: np.ndarray) -> np.ndarray:
    """fp32 that hold bf16 numbers -> their bits, uint16."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    assert not (bits & 0xFFFF)[np.isfinite(values)].any(), "more than bf16 holds"
    return (bits >> 16).astype(np.uint16)


def is_bf16(model: onnx.ModelProto) -> bool:
    return any(one.data_type == BF16 for one in model.graph.initializer)


def emulated(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model, its weights inside, whose inputs and outputs of bf16 are fp32."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph.value_info
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*inferred, *model.graph.output)}
    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph = made.graph
    del graph.node[:], graph.value_info[:]
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == BF16:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for one in graph.initializer:
        if one.data_type == BF16:
            wide = widened(np.frombuffer(one.raw_data, np.uint16) if one.raw_data else np.uint16(one.int32_data))
            one.CopyFrom(helper.make_tensor(one.name, TensorProto.FLOAT, one.dims, wide.tobytes(), raw=True))
    for node in model.graph.node:
        copy = graph.node.add()
        copy.CopyFrom(node)
        for attribute in copy.attribute:
            if attribute.name == "to" and attribute.i == BF16:
                attribute.i = TensorProto.FLOAT
        for place, name in enumerate(node.output):
            if kinds.get(name) == BF16:
                copy.output[place] = f"{name}.exact"
                graph.node.append(helper.make_node("Cast", [f"{name}.exact"], [f"{name}.bf16"], to=BF16))
                graph.node.append(helper.make_node("Cast", [f"{name}.bf16"], [name], to=TensorProto.FLOAT))
    return made
