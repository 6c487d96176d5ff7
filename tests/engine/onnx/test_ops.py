"""The modules of a decoder in every dialect, each against torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from edgeprune.engine.onnx.nodes import Nodes
from edgeprune.engine.onnx.ops import OPERATORS, linear, mlp, normed_queries_and_keys
from edgeprune.model.decoder import Attention, Experts, Mlp
from edgeprune.model.mlp import experts_output
from tests.support.graph_nodes import run

GENERATOR = np.random.default_rng(0)
ACTIVATIONS = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_quick": lambda x: x * torch.sigmoid(1.702 * x),
}


def normal(*shape: int) -> np.ndarray:
    return GENERATOR.standard_normal(shape).astype(np.float32)


@pytest.fixture(params=OPERATORS)
def operators(request: pytest.FixtureRequest):
    return OPERATORS[request.param]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_activation_is_torchs(operators, activation: str) -> None:
    nodes, x = Nodes("fp32"), np.linspace(-6, 6, 241, dtype=np.float32)[None, None]
    name = operators.activate(nodes, "mlp", "x", activation)
    (found,) = run(nodes, [name], {"x": x}, operators=operators)
    np.testing.assert_allclose(found, ACTIVATIONS[activation](torch.from_numpy(x)).numpy(), atol=2e-6)


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("has_update", [True, False])
def test_a_norm_adds_the_update_first_and_returns_the_stream(operators, kind: str, has_update: bool) -> None:
    """The epsilon is as large as the values, so that its place shows."""
    nodes, eps = Nodes("fp32"), 0.7
    inputs = {"hidden": normal(2, 3, 16)} | ({"update": normal(2, 3, 16)} if has_update else {})
    weights = {"norm.weight": normal(16), "norm.bias": normal(16)}
    norm = operators.layer_norm if kind == "layer" else operators.rms_norm
    names = norm(nodes, "normed", "hidden", "update" if has_update else None, "norm.weight", eps)
    if kind == "rms":
        weights.pop("norm.bias")
    outputs = [name for name in names if name != "hidden"]
    found = dict(zip(outputs, run(nodes, outputs, inputs, weights, operators), strict=True))
    stream = torch.from_numpy(sum(inputs.values()))
    np.testing.assert_allclose(found.get(names[0], inputs["hidden"]), stream, atol=1e-6)
    weight = torch.from_numpy(weights["norm.weight"])
    expected = (
        F.layer_norm(stream, (16,), weight, torch.from_numpy(weights["norm.bias"]), eps)
        if kind == "layer"
        else weight * stream / (stream.square().mean(-1, keepdim=True) + eps).sqrt()
    )
    np.testing.assert_allclose(found[names[1]], expected, atol=1e-5)


@pytest.mark.parametrize("gated", [True, False])
def test_an_mlp_is_one_product_that_is_split(operators, gated: bool) -> None:
    nodes, x = Nodes("fp32"), normal(2, 3, 6)
    part = Mlp(5, "relu", gated, input_bias=True, output_bias=True)
    weights = {
        f"mlp.{name}.weight": normal(*shape) for name, shape in (("gate_up", (6, 10 if gated else 5)), ("down", (5, 6)))
    }
    weights |= {"mlp.gate_up.bias": normal(10 if gated else 5), "mlp.down.bias": normal(6)}
    (found,) = run(nodes, [mlp(nodes, operators, "mlp", "x", part)], {"x": x}, weights, operators)
    inner = x @ weights["mlp.gate_up.weight"] + weights["mlp.gate_up.bias"]
    inner = np.maximum(inner[..., :5], 0) * (inner[..., 5:] if gated else 1)
    np.testing.assert_allclose(found, inner @ weights["mlp.down.weight"] + weights["mlp.down.bias"], atol=1e-5)


@pytest.mark.parametrize("normalised", [True, False])
def test_experts_weigh_the_outputs_of_the_likeliest(operators, normalised: bool) -> None:
    nodes, x = Nodes("fp32"), normal(2, 3, 6)
    part = Mlp(5, experts=Experts(4, 2, normalised))
    own = {"mlp.router": normal(4, 6)}
    for expert in range(4):
        own |= {f"mlp.experts.{expert}.{name}": normal(5, 6) for name in ("gate", "up")}
        own[f"mlp.experts.{expert}.down"] = normal(6, 5)
    parts = [[own[f"mlp.experts.{e}.{name}"] for name in ("gate", "up")] for e in range(4)]
    weights = {
        "mlp.router.weight": np.ascontiguousarray(own["mlp.router"].T),
        "mlp.gate_up.weight": np.stack([np.stack(part, axis=1).reshape(10, 6) for part in parts]),  # rows in turn
        "mlp.down.weight": np.stack([own[f"mlp.experts.{e}.down"] for e in range(4)]),
    }
    (found,) = run(nodes, [mlp(nodes, operators, "mlp", "x", part)], {"x": x}, weights, operators)
    expected = experts_output(torch.from_numpy(x), {name: torch.from_numpy(w) for name, w in own.items()}, part)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)


@pytest.mark.parametrize("kind", ["head", "all"])
def test_queries_and_keys_are_normed_and_values_are_not(operators, kind: str) -> None:
    nodes, packed = Nodes("fp32"), normal(2, 3, (4 + 2 * 2) * 8)
    attention = Attention(4, 2, 8, qk_norm=kind)
    weights = {
        f"a.{part}_norm.weight": normal(8 if kind == "head" else heads * 8) for part, heads in (("q", 4), ("k", 2))
    }
    name = normed_queries_and_keys(nodes, operators, "a", "packed", attention, 1e-5)
    (found,) = run(nodes, [name], {"packed": packed}, weights, operators)
    parts, start = [], 0
    for part, heads in (("q", 4), ("k", 2)):
        x = packed[..., start : start + heads * 8].reshape(2, 3, *((heads, 8) if kind == "head" else (heads * 8,)))
        normed = weights[f"a.{part}_norm.weight"] * x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
        parts.append(normed.reshape(2, 3, -1))
        start += heads * 8
    np.testing.assert_allclose(found, np.concatenate([*parts, packed[..., start:]], axis=-1), atol=1e-5)


@pytest.mark.parametrize("has_bias", [True, False])
def test_a_product_has_the_name_that_errors_of_a_builder_show(has_bias: bool) -> None:
    nodes = Nodes("fp32")
    assert linear(nodes, "layers.3.attention.o", "x", "layers.3.attention.o", has_bias) == "layers.3.attention.o"
    assert nodes.nodes[-1].name == "layers.3.attention.o"
    assert [node.op_type for node in nodes.nodes] == (["MatMul", "Add"] if has_bias else ["MatMul"])
