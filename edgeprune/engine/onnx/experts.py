"""A mixture of experts in ONNX operators: in one that reads a token's own experts alone, or with products of all.

It knows the names of weights and not their values. Notation as in ops.py.
"""

from __future__ import annotations

from collections.abc import Callable
from math import gcd

import numpy as np

from edgeprune.engine.onnx.nodes import MICROSOFT, Nodes
from edgeprune.engine.onnx.quantised import matrix
from edgeprune.model.decoder import Activation, Mlp

Activate = Callable[[Nodes, str, str, Activation], str]
BLOCK = 128  # the widest block of inputs with a scale for which ONNX Runtime multiplies codes of single outputs fast
ROUTER_WEIGHTS = 14  # the place of the shares among the inputs of QMoE
SIGMOIDS: dict[Activation, float] = {"silu": 1.0, "gelu_quick": 1.702}
FAST = 4  # the accuracy level with which products stay on the codes, as elsewhere


def all_experts(nodes: Nodes, activate: Activate, name: str, x: str, part: Mlp) -> str:
    """Adds an MLP of experts, from x (b, s, c) to (b, s, c).

    Every expert computes every token, (experts, b * s, ...), and its output is weighted with the router's share, which
    is 0 for all but the token's own experts: TensorRT's parser takes no choice of weights that depends on the token.
    """
    # The shares of the token's own experts, which have the largest ones.
    experts = part.experts
    count, chosen = experts.num_experts, experts.num_experts_per_tok
    logits = nodes.to_fp32(f"{name}.router_fp32", _router(nodes, name, x, part))
    shares = nodes.add("Softmax", f"{name}.shares", logits, axis=-1)  # (b, s, experts)
    outputs = (f"{name}.top", f"{name}.chosen")
    top, places = nodes.add_many("TopK", f"{name}.top_k", (shares, nodes.sizes(chosen)), outputs, axis=-1)
    # top, places: (b, s, num_experts_per_tok)
    if experts.normalised:
        sums = nodes.add("ReduceSum", f"{name}.top_sum", top, nodes.sizes(-1), keepdims=1)
        top = nodes.add("Div", f"{name}.top_shares", top, sums)
    # The same among zeros for all other experts.
    zeros = nodes.add("Mul", f"{name}.no_shares", shares, nodes.constant("zero.fp32", 0.0, np.float32))
    taken = nodes.add("ScatterElements", f"{name}.taken", zeros, places, top, axis=-1)  # (b, s, experts)
    taken = nodes.add("Reshape", f"{name}.by_token", taken, nodes.sizes(1, -1, count))  # (1, b * s, experts)
    taken = nodes.add("Transpose", f"{name}.by_expert", taken, perm=[2, 1, 0])  # (experts, b * s, 1)
    taken = nodes.from_fp32(f"{name}.taken_cast", taken)
    # All tokens of the batch behind each other.
    shape = nodes.add("Shape", f"{name}.shape", x)
    width = nodes.add("Slice", f"{name}.width", shape, nodes.sizes(2), nodes.sizes(3))
    flat_size = nodes.add("Concat", f"{name}.flat_shape", nodes.sizes(1, -1), width, axis=0)
    flat = nodes.add("Reshape", f"{name}.flat", x, flat_size)  # (1, b * s, c)
    # Every expert's output, weighted and summed.
    inner = _inner(nodes, activate, name, flat, part)  # (experts, b * s, i)
    outputs_of_all = _of_each(nodes, f"{name}.each", inner, f"{name}.down", part.output_bias)  # (experts, b * s, c)
    weighted = nodes.add("Mul", f"{name}.weighted", outputs_of_all, taken)
    total = nodes.add("ReduceSum", f"{name}.total", weighted, nodes.sizes(0), keepdims=0)  # (b * s, c)
    return nodes.add("Reshape", f"{name}.down", total, shape)


def own_experts(nodes: Nodes, activate: Activate, name: str, x: str, part: Mlp) -> str:
    """Adds what all_experts adds, in ONNX Runtime's operator that reads the weights of a token's own experts alone.

    It has gated MLPs with x * sigmoid(alpha * x), in floats or in symmetric codes; others are all_experts.
    """
    codes = nodes.quantised.get(f"{name}.gate_up.weight")
    if not part.gated or part.activation not in SIGMOIDS or (codes and codes.form.offset):
        return all_experts(nodes, activate, name, x, part)
    experts = part.experts
    logits = _router(nodes, name, x, part)
    logits = nodes.add("Reshape", f"{name}.by_token", logits, nodes.sizes(-1, experts.num_experts))
    attributes = {
        "k": experts.num_experts_per_tok,
        "normalize_routing_weights": int(experts.normalised),
        # gate * sigmoid(alpha * gate) * (up + beta), with the rows of gate and up in turn
        "activation_type": "swiglu",
        "swiglu_fusion": 1,
        "activation_alpha": SIGMOIDS[part.activation],
        "activation_beta": part.up_shift,
    }
    if part.limit is not None:
        attributes["swiglu_limit"] = part.limit
    biases = {"gate_up": part.input_bias, "down": part.output_bias}
    biases = {kind: f"{name}.{kind}.bias" if has_bias else "" for kind, has_bias in biases.items()}
    if codes is None:
        tensors = [tensor for kind, bias in biases.items() for tensor in (f"{name}.{kind}.weight", bias)]
        return nodes.add("MoE", f"{name}.down", x, logits, *_given(tensors), domain=MICROSOFT, **attributes)
    block = codes.form.group or _block(codes.shape[1], part.intermediate_size)
    tensors = [
        tensor for kind, bias in biases.items() for tensor in (*_unsigned(nodes, f"{name}.{kind}.weight", block), bias)
    ]
    attributes |= {"expert_weight_bits": codes.form.bits, "block_size": block, "accuracy_level": FAST}
    inputs = (x, logits, *_given(tensors))
    if not experts.normalised:  # it normalises whatever it is told (1.32), but not shares that it is given
        shares = nodes.add("Softmax", f"{name}.shares", logits, axis=-1)
        inputs = (*inputs, *[""] * (ROUTER_WEIGHTS - len(inputs)), shares)
    return nodes.add("QMoE", f"{name}.down", *inputs, domain=MICROSOFT, **attributes)


def _router(nodes: Nodes, name: str, x: str, part: Mlp) -> str:
    """Adds the router's logits (b, s, experts) of x (b, s, c)."""
    logits = nodes.add("MatMul", f"{name}.router", x, f"{name}.router.weight")
    return nodes.add("Add", f"{name}.router_logits", logits, f"{name}.router.bias") if part.experts.bias else logits


def gated(nodes: Nodes, activate: Activate, name: str, gate: str, up: str, part: Mlp) -> str:
    """Adds what a gated MLP makes of the outputs of its first projections, all of one shape."""
    if part.limit is not None:
        most, least = (nodes.number(f"number.{limit}", limit) for limit in (part.limit, -part.limit))
        gate = nodes.add("Clip", f"{name}.gate_limited", gate, "", most)
        up = nodes.add("Clip", f"{name}.up_limited", up, least, most)
    if part.up_shift:
        up = nodes.add("Add", f"{name}.up_shifted", up, nodes.number(f"number.{part.up_shift}", part.up_shift))
    return nodes.add("Mul", f"{name}.gated", activate(nodes, name, gate, part.activation), up)


def _inner(nodes: Nodes, activate: Activate, name: str, x: str, part: Mlp) -> str:
    """Adds the inputs (experts, b * s, i) of the down projections, from x (1, b * s, c)."""
    product = _of_each(nodes, f"{name}.gate_up", x, f"{name}.gate_up", part.input_bias)
    if not part.gated:
        return activate(nodes, name, product, part.activation)
    # Gate and up stand in turn.
    last, step, end = nodes.sizes(-1), nodes.sizes(2), nodes.sizes(2 * part.intermediate_size)
    gate, up = (
        nodes.add("Slice", f"{name}.{kind}", product, nodes.sizes(first), end, last, step)
        for first, kind in enumerate(("gate", "up"))
    )
    return gated(nodes, activate, name, gate, up, part)


def _of_each(nodes: Nodes, name: str, x: str, weight: str, has_bias: bool) -> str:
    """Adds the products (experts, b * s, out) of x (1 or experts, b * s, in) with the experts' matrices, and biases."""
    values, codes = matrix(nodes, f"{weight}.weight"), nodes.quantised.get(f"{weight}.weight")
    if codes is None or not codes.transposed:
        values = nodes.add("Transpose", f"{weight}.columns", values, perm=[0, 2, 1])  # (experts, in, out)
    product = nodes.add("MatMul", f"{name}.products" if has_bias else name, x, values)
    if not has_bias:
        return product
    bias = nodes.add("Reshape", f"{weight}.bias_of_tokens", f"{weight}.bias", nodes.sizes(0, 1, -1))
    return nodes.add("Add", name, product, bias)


def _given(inputs: list[str]) -> list[str]:
    """Returns inputs of a node without the one at their end that is not given."""
    return inputs if inputs[-1] else inputs[:-1]


def _block(*sizes: int) -> int:
    """Returns the widest block of a power of two that divides both sizes, 16 at least; 0 where there is none."""
    common = gcd(BLOCK, *sizes)
    return common if common >= 16 else 0


def _unsigned(nodes: Nodes, name: str, block: int) -> tuple[str, str]:
    """Adds codes and scales of a matrix as QMoE reads them: codes above zero in bytes, a scale for every block.

    Both are made when a session is opened. Codes of two's complement differ from these in their highest bit.
    """
    codes = nodes.quantised[name]
    highest = nodes.constant(f"highest_bits.{codes.form.bits}", 0x88 if codes.form.bits == 4 else 0x80, np.uint8)
    unsigned, scales = nodes.add("BitwiseXor", f"{name}.unsigned", f"{name}.bytes", highest), f"{name}.scales"
    if not codes.transposed:
        return unsigned, scales
    # A scale for each output: codes are (experts, in, out), scales (experts, 1, out).
    count, inputs, rows = codes.shape
    unsigned = nodes.add("Transpose", f"{name}.unsigned_rows", unsigned, perm=[0, 2, 1])
    scales = nodes.add("Reshape", f"{name}.row_scales", scales, nodes.sizes(count, rows, *[1] * bool(block)))
    if block:
        scales = nodes.add("Expand", f"{name}.block_scales", scales, nodes.sizes(count, rows, inputs // block))
    return unsigned, scales
