"""The ONNX graph of a codec's decoder, written directly, in fp32 and operators of opset 17.

It does not know the image generator whose codes are decoded.
Input: codes (batch, side * side) int64. Output: image (batch, 3, height, width) fp32, nominally in [-1, 1]. The side
is fixed, the batch is not. Weights of more than INSIDE_BYTES in all are stored in a data file beside the graph.
Notation: b batch, c channels, n = side * side positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeprune.engine.onnx.data import ALIGNMENT
from edgeprune.engine.onnx.nodes import Nodes
from edgeprune.errors import NumericalError
from edgeprune.model.codec.codec import Codec, VqCodec
from edgeprune.model.codec.layers import COLOURS, GROUPS, NORM_EPS, CodecStep

if TYPE_CHECKING:
    import torch
    from onnx import TensorProto

OPSET, IR_VERSION = 17, 8
INSIDE_BYTES = 1 << 20
TABLE = "codes.table"


def write_codec(codec: Codec, side: int, path: Path) -> None:
    """Writes the graph that decodes side * side codes to `path`, and large weights to `path` + `.data`.

    Equal input gives equal bytes. Raises NumericalError for a weight that is not finite.
    """
    from onnx import TensorProto, helper

    # The nodes: a convolutional decoder, or a table of colours.
    nodes = Nodes("fp32")
    pixels = side * codec.downsample
    if isinstance(codec, VqCodec):
        weights = _decode(nodes, codec, side)
    else:
        weights = {TABLE: codec.clusters}
        _place(nodes, "image", COLOURS, side)
    # Inputs, outputs and weights.
    codes = helper.make_tensor_value_info("codes", TensorProto.INT64, ["batch", side * side])
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", COLOURS, pixels, pixels])
    initializers = [*_write_weights(weights, path), *nodes.constants.values()]
    model = helper.make_model(
        helper.make_graph(nodes.nodes, "codec", [codes], [image], initializers),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="edgeprune",
    )
    path.write_bytes(model.SerializeToString(deterministic=True))


def _place(nodes: Nodes, name: str, width: int, side: int) -> str:
    """Adds the table's row of every code in its position of the image: (b, width, side, side)."""
    rows = nodes.add("Gather", "codes.rows", TABLE, "codes", axis=0)  # (b, n, width)
    rows = nodes.add("Transpose", "codes.columns", rows, perm=[0, 2, 1])  # (b, width, n)
    return nodes.add("Reshape", name, rows, nodes.sizes(0, width, side, side))


def _decode(nodes: Nodes, codec: VqCodec, side: int) -> dict[str, torch.Tensor]:
    """Adds the nodes from `codes` to `image`; returns the weights that they read, by name."""
    x = _place(nodes, "codes.placed", codec.layout.code_size, side)
    weights = {TABLE: codec.codebook}
    for step in codec.layout.decoding():
        x = _taken(nodes, step, x, side)
        side *= 2 if step.kind == "upsample" else 1
        weights |= {name: codec.weights[name] for name in step.shapes()}
    nodes.add("Identity", "image", x)
    # A norm's weight and bias multiply and shift whole channels, (c, 1, 1).
    return {name: tensor[:, None, None] if "norm" in name else tensor for name, tensor in weights.items()}


def _taken(nodes: Nodes, step: CodecStep, x: str, side: int) -> str:
    """Adds a step of the decoder, from x (b, inputs, side, side) to its output's name."""
    name = step.name
    match step.kind:
        case "point" | "conv":
            return _conv(nodes, name, x, step.shapes())
        case "upsample":
            scales = nodes.constant("upsample.scales", [1, 1, 2, 2], np.float32)
            modes = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
            return _conv(nodes, f"{name}.conv", nodes.add("Resize", name, x, "", scales, **modes), step.shapes())
        case "activation":
            return _activation(nodes, name, x, step.inputs, side)
        case "attention":
            return nodes.add("Add", name, x, _attention(nodes, step, x, side))
    # Any other step is a residual block of two convolutions.
    inner = _activation(nodes, f"{name}.norm1", x, step.inputs, side)
    inner = _conv(nodes, f"{name}.conv1", inner, step.shapes())
    inner = _activation(nodes, f"{name}.norm2", inner, step.outputs, side)
    inner = _conv(nodes, f"{name}.conv2", inner, step.shapes())
    if step.inputs != step.outputs:
        x = _conv(nodes, f"{name}.nin_shortcut", x, step.shapes())
    return nodes.add("Add", name, x, inner)


def _conv(nodes: Nodes, name: str, x: str, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Adds a convolution that keeps the size of the image."""
    kernel = shapes[f"{name}.weight"][2]
    attributes = {"kernel_shape": [kernel, kernel], "pads": [kernel // 2] * 4}
    return nodes.add("Conv", name, x, f"{name}.weight", f"{name}.bias", **attributes)


def _norm(nodes: Nodes, name: str, x: str, channels: int, side: int) -> str:
    """Adds the group norm of x (b, c, side, side), by an instance norm of the groups.

    The operator GroupNormalization has a weight of each channel only from opset 21 on, and it is not faster.
    """
    # (b, groups, c / groups * n)
    groups = nodes.add("Reshape", f"{name}.groups", x, nodes.sizes(0, GROUPS, -1))
    one, zero = (nodes.constant(f"norm.{fill}", [fill] * GROUPS, np.float32) for fill in (1, 0))
    groups = nodes.add("InstanceNormalization", f"{name}.normed", groups, one, zero, epsilon=NORM_EPS)
    x = nodes.add("Reshape", f"{name}.channels", groups, nodes.sizes(0, channels, side, side))
    return nodes.add("Add", name, nodes.add("Mul", f"{name}.scaled", x, f"{name}.weight"), f"{name}.bias")


def _activation(nodes: Nodes, name: str, x: str, channels: int, side: int) -> str:
    """Adds a norm and swish, x * sigmoid(x), of x (b, c, side, side)."""
    x = _norm(nodes, name, x, channels, side)
    return nodes.add("Mul", f"{name}.swish", x, nodes.add("Sigmoid", f"{name}.sigmoid", x))


def _attention(nodes: Nodes, step: CodecStep, x: str, side: int) -> str:
    """Adds the attention of all positions to each other, of x (b, c, side, side), without its residual."""
    name, channels = step.name, step.inputs
    # Queries, keys and values by convolutions of 1 x 1.
    x = _norm(nodes, f"{name}.norm", x, channels, side)
    images = (_conv(nodes, f"{name}.{part}", x, step.shapes()) for part in "qkv")
    # (b, c, n) each
    q, k, v = (nodes.add("Reshape", f"{image}.flat", image, nodes.sizes(0, channels, -1)) for image in images)
    # Scores, softmax over the keys, and the weighted sum of the values.
    q = nodes.add("Mul", f"{name}.q.scaled", q, nodes.number(f"number.{channels**-0.5}", channels**-0.5))
    scores = nodes.add("MatMul", f"{name}.scores", nodes.add("Transpose", f"{name}.q.rows", q, perm=[0, 2, 1]), k)
    shares = nodes.add("Softmax", f"{name}.shares", scores, axis=-1)  # (b, n of queries, n of keys)
    shares = nodes.add("Transpose", f"{name}.shares.columns", shares, perm=[0, 2, 1])
    context = nodes.add("MatMul", f"{name}.context.flat", v, shares)  # (b, c, n)
    context = nodes.add("Reshape", f"{name}.context", context, nodes.sizes(0, channels, side, side))
    return _conv(nodes, f"{name}.proj_out", context, step.shapes())


def _write_weights(weights: Mapping[str, torch.Tensor], path: Path) -> list[TensorProto]:
    """Returns the initializers, with small weights inside; writes large ones to the data file.

    Raises NumericalError for a weight that is not finite.
    """
    from onnx import TensorProto, numpy_helper

    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise NumericalError(f"the codec's {name} holds values that are not finite", "Download the codec again.")
    if sum(tensor.nbytes for tensor in weights.values()) <= INSIDE_BYTES:
        return [numpy_helper.from_array(tensor.numpy(), name) for name, tensor in weights.items()]
    # A data file, with every weight at an aligned offset.
    initializers, data = [], path.with_name(f"{path.name}.data")
    with data.open("wb") as file:
        for name, tensor in weights.items():
            file.write(bytes(-file.tell() % ALIGNMENT))
            entries = {"location": data.name, "offset": file.tell(), "length": tensor.nbytes}
            initializer = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=tensor.shape)
            initializer.data_location = TensorProto.EXTERNAL
            for key, value in entries.items():
                initializer.external_data.add(key=key, value=str(value))
            initializers.append(initializer)
            file.write(memoryview(tensor.contiguous().numpy()).cast("B"))
    return initializers
