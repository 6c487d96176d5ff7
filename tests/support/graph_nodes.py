"""A few nodes as a graph of their own, run by ONNX Runtime; and the types that the operators of a graph admit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
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


def refused_types(model: onnx.ModelProto) -> list[str]:
    """Inputs and outputs of a type that their operator's schema in the model's opset does not admit: the checker
    looks at shapes and names, not at these."""
    model = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    graph, opset = model.graph, model.opset_import[0].version
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.input, *graph.output)}
    kinds |= {one.name: one.data_type for one in graph.initializer}
    found = []
    for node in graph.node:
        schema = onnx.defs.get_schema(node.op_type, opset)
        for names, formals in ((node.input, schema.inputs), (node.output, schema.outputs)):
            for place, name in enumerate(names):
                if not name:  # an optional one that is not given
                    continue
                formal = formals[min(place, len(formals) - 1)]
                text = f"tensor({helper.tensor_dtype_to_string(kinds[name]).removeprefix('TensorProto.').lower()})"
                if text not in {str(kind) for kind in formal.types}:
                    found.append(f"{node.op_type} {node.name}: {name} is {text}")
    return found
