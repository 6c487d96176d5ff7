"""The modules of a Decoder in ONNX operators: norms, activations, MLP and experts in the dialects.

It knows the names of weights and not their values; data.py decides where these are stored.
Notation: b batch, s sequence (new tokens), t total (past + new), h query heads, k key/value heads,
g = h / k, d head_dim, c hidden_size, i intermediate_size. A value has the name of the node that makes it, and
this name contains the layer (`layers.3.attention.o`), so that the errors of an engine's builder are readable.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edgeprune.dialects import Dialect
from edgeprune.engine.onnx.attention import (
    attention_onnxruntime,
    attention_opset23,
    attention_primitive,
    prepare_onnxruntime,
    prepare_opset23,
    prepare_opset24,
    prepare_primitive,
)
from edgeprune.engine.onnx.experts import Activate, all_experts, gated, own_experts
from edgeprune.engine.onnx.nodes import MICROSOFT, Nodes, Shared
from edgeprune.engine.onnx.quantised import matrix, offsets, rounded
from edgeprune.model.decoder import Activation, Attention, Decoder, Mlp

PARTS = ("alpha_p", "alpha_n")  # of xielu's parameters, those under a softplus
Norm = Callable[[Nodes, str, str, "str | None", str, float], tuple[str, str]]
"""Called with nodes, name, hidden (b, s, c), update (b, s, c) or None, weight and epsilon; returns the names of
hidden + update, and of its norm."""


def add_update(nodes: Nodes, hidden: str, update: str | None) -> str:
    """Adds an update, if any, to the stream; returns the name of the stream."""
    return hidden if update is None else nodes.add("Add", f"{update}.residual", hidden, update)


def _norm_opset23(nodes: Nodes, name: str, hidden: str, update: str | None, weight: str, eps: float) -> tuple[str, str]:
    hidden = add_update(nodes, hidden, update)
    return hidden, nodes.add("RMSNormalization", name, hidden, weight, axis=-1, epsilon=eps, stash_type=1)


def _norm_primitive(
    nodes: Nodes, name: str, hidden: str, update: str | None, weight: str, eps: float
) -> tuple[str, str]:
    """Adds weight * x / sqrt(mean(x^2) + eps), with the mean in fp32 (Zhang and Sennrich 2019, eq. 4)."""
    hidden = add_update(nodes, hidden, update)
    x = nodes.to_fp32(f"{name}.fp32", hidden)
    square = nodes.add("Pow", f"{name}.square", x, nodes.constant("norm.two", 2, np.float32))
    if nodes.opset < 18:
        mean = nodes.add("ReduceMean", f"{name}.mean", square, axes=[-1], keepdims=1)
    else:
        mean = nodes.add("ReduceMean", f"{name}.mean", square, nodes.sizes(-1), keepdims=1)
    shifted = nodes.add("Add", f"{name}.shifted", mean, nodes.constant("norm.epsilon", eps, np.float32))
    scaled = nodes.add("Div", f"{name}.scaled", x, nodes.add("Sqrt", f"{name}.rms", shifted))
    return hidden, nodes.add("Mul", name, nodes.from_fp32(f"{name}.cast", scaled), weight)


def _norm_onnxruntime(
    nodes: Nodes, name: str, hidden: str, update: str | None, weight: str, eps: float
) -> tuple[str, str]:
    if update is None:
        attributes = {"axis": -1, "epsilon": eps, "stash_type": 1}
        return hidden, nodes.add("SimplifiedLayerNormalization", name, hidden, weight, **attributes)
    normed, _, _, hidden = nodes.add_many(
        "SkipSimplifiedLayerNormalization",
        name,
        (hidden, update, weight),
        (name, "", "", f"{update}.residual"),
        MICROSOFT,
        epsilon=eps,
    )
    return hidden, normed


def _layer_norm(nodes: Nodes, name: str, hidden: str, update: str | None, weight: str, eps: float) -> tuple[str, str]:
    """Adds a LayerNorm, with mean and variance in fp32; the bias has the weight's name with `bias` at its end."""
    hidden = add_update(nodes, hidden, update)
    attributes = {"axis": -1, "epsilon": eps, "stash_type": 1}
    return hidden, nodes.add("LayerNormalization", name, hidden, weight, _bias_of(weight), **attributes)


def _layer_norm_onnxruntime(
    nodes: Nodes, name: str, hidden: str, update: str | None, weight: str, eps: float
) -> tuple[str, str]:
    if update is None:
        return _layer_norm(nodes, name, hidden, update, weight, eps)
    outputs = (name, "", "", f"{update}.residual")
    inputs = (hidden, update, weight, _bias_of(weight))
    normed, _, _, hidden = nodes.add_many("SkipLayerNormalization", name, inputs, outputs, MICROSOFT, epsilon=eps)
    return hidden, normed


def _bias_of(weight: str) -> str:
    return weight.removesuffix("weight") + "bias"


def _activate(nodes: Nodes, name: str, x: str, activation: Activation) -> str:
    """Adds an activation in operators of opset 17.

    silu is x * sigmoid(x), gelu is x * (1 + erf(x / sqrt(2))) / 2, and gelu_quick and gelu_tanh approximate gelu.
    """
    # Those of one function.
    if activation in ("silu", "gelu_quick"):
        scaled = x if activation == "silu" else nodes.add("Mul", f"{name}.scaled", x, _number(nodes, 1.702))
        return nodes.add("Mul", f"{name}.{activation}", x, nodes.add("Sigmoid", f"{name}.sigmoid", scaled))
    if activation == "relu":
        return nodes.add("Relu", f"{name}.relu", x)
    if activation == "xielu":
        return _xielu(nodes, name, x)
    # The inner function of gelu: erf(x / sqrt(2)), or tanh(sqrt(2 / pi) * (x + 0.044715 x^3)).
    if activation == "gelu":
        inner = nodes.add("Erf", f"{name}.erf", nodes.add("Mul", f"{name}.narrowed", x, _number(nodes, 0.5**0.5)))
    else:
        cube = nodes.add("Mul", f"{name}.cube", nodes.add("Mul", f"{name}.square", x, x), x)
        bent = nodes.add("Add", f"{name}.bent", x, nodes.add("Mul", f"{name}.bend", cube, _number(nodes, 0.044715)))
        scaled = nodes.add("Mul", f"{name}.bent_scaled", bent, _number(nodes, math.sqrt(2 / math.pi)))
        inner = nodes.add("Tanh", f"{name}.tanh", scaled)
    # x / 2 * (1 + inner)
    gate = nodes.add("Add", f"{name}.shifted", inner, _number(nodes, 1.0))
    return nodes.add("Mul", f"{name}.gelu", nodes.add("Mul", f"{name}.half", x, _number(nodes, 0.5)), gate)


def _xielu(nodes: Nodes, name: str, x: str) -> str:
    """Adds xIELU: x * beta, and beside it x^2 * softplus(alpha_p) where x is above 0, elsewhere
    (exp(min(x, eps)) - 1 - x) * (beta + softplus(alpha_n))."""
    # Softplus takes no bf16.
    positive, negative = (
        nodes.from_fp32(
            f"{name}.{part}_cast",
            nodes.add("Softplus", f"{name}.{part}_plus", nodes.to_fp32(f"{name}.{part}_fp32", f"{name}.{part}")),
        )
        for part in PARTS
    )
    line = nodes.add("Mul", f"{name}.line", x, f"{name}.beta")
    # Products with the factor first, which stay within what is added up in the end.
    square = nodes.add("Mul", f"{name}.square", nodes.add("Mul", f"{name}.slope", x, positive), x)
    power = nodes.add("Exp", f"{name}.power", nodes.add("Min", f"{name}.below", x, f"{name}.eps"))
    bend = nodes.add("Sub", f"{name}.bend", nodes.add("Sub", f"{name}.shifted", power, _number(nodes, 1.0)), x)
    bend = nodes.add("Mul", f"{name}.bent", bend, nodes.add("Add", f"{name}.negative", negative, f"{name}.beta"))
    is_above = nodes.add("Greater", f"{name}.is_above", x, _number(nodes, 0.0))
    return nodes.add("Add", f"{name}.xielu", nodes.add("Where", f"{name}.side", is_above, square, bend), line)


def _number(nodes: Nodes, value: float) -> str:
    return nodes.number(f"number.{value}", value)


def _activate_opset23(nodes: Nodes, name: str, x: str, activation: Activation) -> str:
    if activation not in ("gelu", "gelu_tanh"):
        return _activate(nodes, name, x, activation)
    return nodes.add("Gelu", f"{name}.gelu", x, approximate="tanh" if activation == "gelu_tanh" else "none")


def _activate_onnxruntime(nodes: Nodes, name: str, x: str, activation: Activation) -> str:
    if activation == "relu":  # ONNX Runtime does not fuse a product with DequantizeLinear before a Relu (1.32)
        return nodes.add("Max", f"{name}.relu", x, _number(nodes, 0.0))
    if activation not in ("gelu", "gelu_tanh"):
        return _activate(nodes, name, x, activation)
    operator = "FastGelu" if activation == "gelu_tanh" else "Gelu"
    return nodes.add(operator, f"{name}.gelu", x, domain=MICROSOFT)


@dataclass(frozen=True)
class Operators:
    """The operators of one dialect, where dialects differ.

    opsets: versions by domain, the least that its operators need; prepare: adds the values that all layers share;
    rms_norm, layer_norm, activate, attention, experts: add the nodes of these functions.
    """

    opsets: dict[str, int]
    prepare: Callable[[Nodes, Decoder], Shared]
    rms_norm: Norm
    layer_norm: Norm
    activate: Activate
    attention: Callable[[Nodes, str, str, Attention, Decoder, tuple[str, ...], Shared], str]
    experts: Callable[[Nodes, Activate, str, str, Mlp], str] = all_experts

    def norm(self, decoder: Decoder) -> Norm:
        """Returns the norm that a decoder uses."""
        return self.layer_norm if decoder.norm == "layer" else self.rms_norm


OPERATORS: dict[Dialect, Operators] = {
    "opset24": Operators({"": 24}, prepare_opset24, _norm_opset23, _layer_norm, _activate_opset23, attention_opset23),
    "opset23": Operators({"": 23}, prepare_opset23, _norm_opset23, _layer_norm, _activate_opset23, attention_opset23),
    "primitive": Operators({"": 17}, prepare_primitive, _norm_primitive, _layer_norm, _activate, attention_primitive),
    "onnxruntime": Operators(
        {"": 17, MICROSOFT: 1},
        prepare_onnxruntime,
        _norm_onnxruntime,
        _layer_norm_onnxruntime,
        _activate_onnxruntime,
        attention_onnxruntime,
        own_experts,
    ),
}


def linear(nodes: Nodes, name: str, x: str, weight: str, has_bias: bool) -> str:
    """Adds x W + b, with `name` for the result.

    x: (..., in); weight: the name of the matrix (in, out) without `.weight`.
    """
    x = rounded(nodes, x, f"{weight}.weight")
    values = matrix(nodes, f"{weight}.weight")
    terms = offsets(nodes, name, x, f"{weight}.weight") + [f"{weight}.bias"] * has_bias
    names = [*(f"{name}.product", f"{name}.moved")[: len(terms)], name]  # the last one is that of the result
    result = nodes.add("MatMul", names[0], x, values)
    for sum_name, term in zip(names[1:], terms, strict=True):
        result = nodes.add("Add", sum_name, result, term)
    return result


def normed_queries_and_keys(
    nodes: Nodes, operators: Operators, name: str, packed: str, attention: Attention, eps: float
) -> str:
    """Adds the RMS norms of queries and keys, of each head or of all heads at once.

    A rotation changes no length: of heads that are normed behind it, only the weights are left for there.
    packed: queries, keys and values (b, s, (h + 2k) * d); returns the name of the same with the norms.
    """
    # Split into queries (b, s, h * d), keys and values (b, s, k * d).
    sizes = {"q": attention.query_size, "k": attention.key_value_size, "v": attention.key_value_size}
    outputs = tuple(f"{name}.{part}_part" for part in sizes)
    tensors = list(nodes.add_many("Split", f"{name}.parts", (packed, nodes.sizes(*sizes.values())), outputs, axis=-1))
    # Norm queries and keys.
    for index, part in enumerate("qk"):
        x, norm = tensors[index], f"{name}.{part}_norm"
        if attention.qk_norm != "all":  # (b, s, heads, d)
            x = nodes.add("Reshape", f"{norm}.heads", x, nodes.sizes(0, 0, -1, attention.head_dim))
        weight = f"{norm}.weight"
        if attention.qk_norm == "turned":
            weight = nodes.add("Expand", f"{norm}.ones", _number(nodes, 1.0), nodes.sizes(attention.head_dim))
        _, x = operators.rms_norm(nodes, norm, x, None, weight, eps)
        if attention.qk_norm != "all":
            x = nodes.add("Reshape", f"{norm}.joined", x, nodes.sizes(0, 0, sizes[part]))
        tensors[index] = x
    return nodes.add("Concat", f"{name}.normed", *tensors, axis=-1)


def mlp(nodes: Nodes, operators: Operators, name: str, x: str, part: Mlp) -> str:
    """Adds down(activation(gate(x)) * up(x)), from x (b, s, c) to (b, s, c).

    gate and up are one product of 2 * intermediate_size columns, which is then split in halves.
    """
    if part.experts is not None:
        return operators.experts(nodes, operators.activate, name, x, part)
    inner = _inner(nodes, operators, name, x, part)
    return linear(nodes, f"{name}.down", inner, f"{name}.down", part.output_bias)


def _inner(nodes: Nodes, operators: Operators, name: str, x: str, part: Mlp) -> str:
    """Adds the inputs of the down projection, from x (..., c) to (..., i)."""
    width = part.intermediate_size
    product = linear(nodes, f"{name}.{'gate_up' if part.gated else 'up'}", x, f"{name}.gate_up", part.input_bias)
    if not part.gated:
        return operators.activate(nodes, name, product, part.activation)
    outputs = (f"{name}.gate", f"{name}.up")
    gate, up = nodes.add_many("Split", f"{name}.split", (product, nodes.sizes(width, width)), outputs, axis=-1)
    return gated(nodes, operators.activate, name, gate, up, part)
