"""A few nodes as a graph of their own, run by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnxruntime
from onnx import ValueInfoProto, helper, numpy_helper

from edgeprune.engine.onnx.nodes import Nodes
from edgeprune.engine.onnx.ops import OPERATORS, Operators


def run(
    nodes: Nodes,
    outputs: Sequence[str],
    inputs: Mapping[str, np.ndarray],
    weights: Mapping[str, np.ndarray] | None = None,
    operators: Operators = OPERATORS["primitive"],
) -> list[np.ndarray]:
    """The values of these names."""
    ends = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), None)
        for name, value in inputs.items()
    ]
    wanted = [ValueInfoProto(name=name) for name in outputs]
    held = [numpy_helper.from_array(value, name) for name, value in (weights or {}).items()]
    graph = helper.make_graph(nodes.nodes, "nodes", ends, wanted, [*nodes.constants.values(), *held])
    opsets = [helper.make_opsetid(domain, version) for domain, version in operators.opsets.items()]
    model = helper.make_model(
        graph, opset_imports=opsets, ir_version=helper.find_min_ir_version_for(opsets, ignore_unknown=True)
    )
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(list(outputs), dict(inputs))
