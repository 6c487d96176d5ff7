"""The operators that read matrices of few bits: DequantizeLinear before a product, and the rows of an embedding; those
that round what a product reads, and those that add the minima of groups to a product.

It knows neither the modules of a decoder nor how an engine fuses the operators. Notation as in ops.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from edgeprune.engine.onnx.data import Initializer
from edgeprune.engine.onnx.groups import grouped_inputs, grouped_matrix, numbers_of
from edgeprune.engine.onnx.nodes import MICROSOFT, Dialect, Nodes, element_type

CODES = ".codes"


def codes_by_name(initializers: Sequence[Initializer]) -> dict[str, Initializer]:
    """Returns the codes of each matrix that is stored in a weight format, by the name of the matrix."""
    return {one.name.removesuffix(CODES): one for one in initializers if one.role == "codes"}


def views(initializers: Sequence[Initializer], dialect: Dialect) -> Iterator[Initializer]:
    """Yields further initializers on the same bytes, of which a dialect makes its own matrices.

    ONNX Runtime fuses a product with its DequantizeLinear where its codes have no other reader: those of a tied table
    have a second name for the embedding. Its operator of experts reads codes as bytes.
    """
    if dialect != "onnxruntime":
        return
    names = {one.name for one in initializers}
    for one in initializers:
        if one.role == "codes" and one.experts:
            *outer, inputs = one.shape
            shape = (*outer, inputs * one.form.bits // 8)
            name = f"{one.name.removesuffix(CODES)}.bytes"
            yield replace(one, name=name, role="bytes", shape=shape, sources=())
        if one.role == "codes" and one.form.e4m3_scales:
            yield numbers_of(one)
        is_tied = one.form is not None and one.sources == ("embedding",)
        if is_tied and (name := f"embedding.weight.{one.role}") not in names:
            yield replace(one, name=name, sources=())


def least_opset(codes: Initializer) -> int:
    """Returns the first version of ONNX's operators whose DequantizeLinear takes a matrix."""
    if codes.form.levels == "e2m1":
        return 23
    by_channel = "block_size" not in _attributes(codes)
    return 19 if by_channel else 21  # float types beside fp32 with 19; blocks and 4 bits with 21


def matrix(nodes: Nodes, name: str) -> str:
    """Returns the name of a matrix in the graph's float type; adds its DequantizeLinear where it is of few bits."""
    codes = nodes.quantised.get(name)
    if codes is None:
        return name
    if codes.form.e4m3_scales:
        return grouped_matrix(nodes, name, codes)
    return nodes.add("DequantizeLinear", name, *_inputs(name, codes), **_attributes(codes))


def rounded(nodes: Nodes, x: str, name: str) -> str:
    """Returns what a product with a matrix reads of x, which is rounded to codes where the matrix' format says so.

    Whole numbers are signed, with 0 for 0.0, as TensorRT asks.
    """
    codes = nodes.quantised.get(name)
    if codes is None or codes.form.activation_bits is None:
        return x
    if codes.form.e4m3_scales:
        return grouped_inputs(nodes, x, name, codes)
    scale, zero = f"{name}.input_scale", nodes.zero(codes.onnx_type)
    rounded_codes = nodes.add("QuantizeLinear", f"{name}.inputs", x, scale, zero)
    return nodes.add("DequantizeLinear", f"{name}.rounded_inputs", rounded_codes, scale, zero)


def offsets(nodes: Nodes, name: str, x: str, weight: str) -> list[str]:
    """Returns the names of what is added to the product of x (b, s, in) with the scaled codes of a matrix: nothing, or
    where groups have minima one value (b, s, out), each group's minimum times the sum of its inputs.

    Engines take codes of a zero of 0 alone, so these are a small product of its own. The means of the groups' inputs
    are made once for all matrices that read the same x.
    """
    codes = nodes.quantised.get(weight)
    if codes is None or codes.form.offset != "minimum":
        return []

    def add_means(of_groups: str) -> str:
        grouped = nodes.add("Reshape", f"{of_groups}.inputs", x, nodes.sizes(0, 0, -1, codes.form.group))
        return nodes.add("ReduceMean", of_groups, grouped, nodes.sizes(-1), keepdims=0)

    means = nodes.once(f"{x}.means", add_means)  # (b, s, groups)
    return [nodes.add("MatMul", f"{name}.offset", means, f"{weight}.offsets")]


def embedded(nodes: Nodes, name: str, ids: str) -> str:
    """Adds the rows of ids (b, s) of a table of few bits, as (b, s, c), without dequantising the whole table.

    DequantizeLinear of a whole table would run at each step in ONNX Runtime, for as long as all layers take.
    """
    codes = nodes.quantised[name]
    axis = 1 if codes.transposed else 0
    # Codes of 4 bits have an operator of their own.
    if codes.form.bits == 4:
        attributes = {"gather_axis": axis, "quantize_axis": 1 - axis, "block_size": codes.form.group}
        code, scale, *zero = _inputs(name, codes)
        inputs = (code, ids, scale, *zero)
        rows = nodes.add("GatherBlockQuantized", f"{name}.rows", *inputs, domain=MICROSOFT, **attributes)
        return _by_token(nodes, rows, axis)
    # The others are gathered, and multiplied with the scales of the same rows.
    rows = _by_token(nodes, nodes.add("Gather", f"{name}.rows", f"{name}.codes", ids, axis=axis), axis)
    rows = nodes.add("Cast", f"{name}.row_values", rows, to=element_type(nodes.precision))
    scales = nodes.add("Gather", f"{name}.row_scales", f"{name}.scales", ids, axis=0)  # (b, s)
    scales = nodes.add("Unsqueeze", f"{name}.row_factors", scales, nodes.sizes(-1))
    return nodes.add("Mul", f"{name}.scaled_rows", rows, scales)


def _by_token(nodes: Nodes, rows: str, axis: int) -> str:
    """Returns rows (b, s, c), from (c, b, s) where they were gathered along axis 1."""
    return nodes.add("Transpose", f"{rows}_by_token", rows, perm=[1, 2, 0]) if axis == 1 else rows


def _inputs(name: str, codes: Initializer) -> list[str]:
    return [f"{name}.codes", f"{name}.scales", *([f"{name}.zeros"] if codes.form.offset == "zero" else [])]


def _attributes(codes: Initializer) -> dict[str, Any]:
    """Returns the axis of a matrix' scales, and the inputs that share one where there are groups.

    Scales of single outputs that no vector can hold, as those of several experts, are blocks of all inputs.
    """
    inputs_axis = len(codes.shape) - (2 if codes.transposed else 1)
    if codes.form.group is None and len(codes.shape) == 2:
        return {"axis": 1 - inputs_axis}
    return {"axis": inputs_axis, "block_size": codes.form.group or codes.shape[inputs_axis]}
