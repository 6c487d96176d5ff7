"""A double of TensorRT's TRT_FP4DynamicQuantize for ONNX's reference evaluator, as NVIDIA's documentation has it.

Of each block along the axis: its scale is the largest magnitude over 6 and the given scale, in e4m3; its codes are its
numbers over both scales, in e2m1. What is beyond the largest is cut off.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun


class TRT_FP4DynamicQuantize(OpRun):  # noqa: N801, the operator's name
    op_domain = "trt"

    def _run(self, x, scale, axis=-1, block_size=16, scale_type=None):  # noqa: ANN001, ANN202
        assert axis in (-1, x.ndim - 1)
        assert (block_size, scale_type) == (16, onnx.TensorProto.FLOAT8E4M3FN)
        blocks = x.reshape(*x.shape[:-1], -1, block_size)
        scales = np.minimum(np.abs(blocks).max(-1) / 6 / scale, 448).astype(ml_dtypes.float8_e4m3fn)
        both = scales.astype(np.float32)[..., None] * scale
        codes = np.divide(blocks, both, out=np.zeros_like(blocks), where=both != 0)
        return codes.astype(ml_dtypes.float4_e2m1fn).reshape(x.shape), scales


def product(model: onnx.ModelProto, name: str, x: np.ndarray) -> np.ndarray:
    """The output of one linear layer without a bias of a graph, for its input x."""
    nodes = [node for node in model.graph.node if node.name == name or node.name.startswith(f"{name}.weight")]
    made = {output for node in nodes for output in node.output}
    stored = [tensor for tensor in model.graph.initializer if any(tensor.name in node.input for node in nodes)]
    (read,) = {one for node in nodes for one in node.input} - made - {tensor.name for tensor in stored}
    graph = onnx.helper.make_graph(
        nodes,
        "product",
        [onnx.helper.make_tensor_value_info(read, onnx.TensorProto.FLOAT, x.shape)],
        [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)],
        stored,
    )
    whole = onnx.helper.make_model(graph, opset_imports=model.opset_import)
    return ReferenceEvaluator(whole, new_ops=[TRT_FP4DynamicQuantize]).run(None, {read: x})[0]
