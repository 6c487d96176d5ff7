"""The operators of formats whose groups have scales of e4m3 (NVFP4): of a matrix, and of what its product reads.

TensorRT has an operator of its own that finds the scales of what is read. ONNX Runtime has neither that nor the type of
the codes, so its dialect has the same arithmetic in operators that it knows; those of the matrix are run once, when a
session is made. It does not know the modules of a decoder. Notation as in ops.py.
"""

from __future__ import annotations

from dataclasses import replace

from edgeprune.engine.onnx.data import Initializer
from edgeprune.engine.onnx.nodes import Nodes, element_type
from edgeprune.precision import E2M1

TENSORRT = "trt"  # the domain of TensorRT's own operators


def numbers_of(codes: Initializer) -> Initializer:
    """Returns the initializer of whole numbers on the bytes of codes of e2m1, which ONNX Runtime has no type for."""
    return replace(codes, name=f"{codes.name.removesuffix('.codes')}.numbers", role="numbers", sources=())


def grouped_matrix(nodes: Nodes, name: str, codes: Initializer) -> str:
    """Adds the floats (in, out) of a matrix; returns its name."""
    from onnx import TensorProto

    inputs, outputs = codes.shape
    group, unit = codes.form.group, f"{name}.scale_unit"
    if nodes.dialect != "onnxruntime":
        scales = nodes.add("DequantizeLinear", f"{name}.scales", f"{name}.scale_codes", unit)  # (groups, out)
        return nodes.add("DequantizeLinear", name, f"{name}.codes", scales, axis=0, block_size=group)
    table = [*E2M1, *(-level for level in E2M1)]
    scales = nodes.add("Cast", f"{name}.scale_levels", f"{name}.scale_codes", to=element_type(nodes.precision))
    scales = nodes.add("Mul", f"{name}.scales", scales, unit)
    scales = nodes.add("Unsqueeze", f"{name}.grouped_scales", scales, nodes.sizes(1))  # (groups, 1, out)
    numbers = nodes.add("Cast", f"{name}.places", f"{name}.numbers", to=TensorProto.INT32)
    levels = nodes.add("Gather", f"{name}.levels", nodes.number("levels.e2m1", table), numbers)  # (in, out)
    levels = nodes.add("Reshape", f"{name}.grouped", levels, nodes.sizes(inputs // group, group, outputs))
    scaled = nodes.add("Mul", f"{name}.scaled", levels, scales)
    return nodes.add("Reshape", name, scaled, nodes.sizes(inputs, outputs))


def grouped_inputs(nodes: Nodes, x: str, name: str, codes: Initializer) -> str:
    """Adds x (b, s, in) rounded to levels, by a scale for each group of a token; returns its name.

    The scale of a group is its largest magnitude over the largest level and the unit, rounded to e4m3, times the unit.
    name: of the matrix.
    """
    from onnx import TensorProto

    group, most, unit, prefix = codes.form.group, codes.form.most, f"{name}.input_scale", f"{name}.inputs"
    if nodes.dialect != "onnxruntime":
        attributes = {"axis": -1, "block_size": group, "scale_type": TensorProto.FLOAT8E4M3FN}
        outputs = (f"{prefix}.codes", f"{prefix}.scale_codes")
        nodes.add_many("TRT_FP4DynamicQuantize", prefix, (x, unit), outputs, TENSORRT, **attributes)
        scales = nodes.add("DequantizeLinear", f"{prefix}.scales", outputs[1], unit)
        return nodes.add("DequantizeLinear", f"{prefix}.rounded", outputs[0], scales, axis=-1, block_size=group)
    number = nodes.number
    # The scales (b, s, groups, 1).
    grouped = nodes.add("Reshape", f"{prefix}.grouped", x, nodes.sizes(0, 0, -1, group))
    sizes = nodes.add("Abs", f"{prefix}.sizes", grouped)
    largest = nodes.add("ReduceMax", f"{prefix}.largest", sizes, nodes.sizes(-1), keepdims=1)
    reach = nodes.add("Mul", f"{prefix}.reach", unit, number(f"number.{most}", most))
    scales = nodes.add("Div", f"{prefix}.scales_of_unit", largest, reach)
    scales = nodes.add("Cast", f"{prefix}.scale_codes", scales, to=TensorProto.FLOAT8E4M3FN)
    scales = nodes.add("Cast", f"{prefix}.scale_levels", scales, to=element_type(nodes.precision))
    scales = nodes.add("Mul", f"{prefix}.scales", scales, unit)
    is_zero = nodes.add("Equal", f"{prefix}.is_zero", scales, number("number.0", 0.0))
    divisors = nodes.add("Where", f"{prefix}.divisors", is_zero, number("number.inf", float("inf")), scales)
    # The levels (b, s, groups, group): steps of 0.5 below 2, of 1 below 4, then of 2.
    levels = nodes.add("Div", f"{prefix}.quotients", grouped, divisors)
    ends = (number(f"number.{end}", end) for end in (-most, most))
    levels = nodes.add("Clip", f"{prefix}.clipped", levels, *ends)
    sizes = nodes.add("Abs", f"{prefix}.level_sizes", levels)
    is_small = nodes.add("Less", f"{prefix}.is_small", sizes, number("number.2", 2.0))
    is_middle = nodes.add("Less", f"{prefix}.is_middle", sizes, number("number.4", 4.0))
    steps = nodes.add("Where", f"{prefix}.coarse_steps", is_middle, number("number.1", 1.0), number("number.2", 2.0))
    steps = nodes.add("Where", f"{prefix}.steps", is_small, number("number.0.5", 0.5), steps)
    levels = nodes.add("Round", f"{prefix}.whole", nodes.add("Div", f"{prefix}.of_steps", levels, steps))
    levels = nodes.add("Mul", f"{prefix}.levels", levels, steps)
    rounded = nodes.add("Mul", f"{prefix}.scaled", levels, scales)
    return nodes.add("Reshape", f"{prefix}.rounded", rounded, nodes.sizes(0, 0, codes.shape[0]))
