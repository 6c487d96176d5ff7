"""The MLPs of the Decoder's forward pass in torch: one for all tokens, or experts of which each token takes some.

Notation as in `forward`: b samples, t tokens, c hidden_size, i intermediate_size, n tokens of all samples.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from edgeprune.model.attention import LayerWeights
from edgeprune.model.decoder import XIELU, Experts, Mlp

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "gelu_quick": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
}


def mlp_activation(x: torch.Tensor, weights: LayerWeights, mlp: Mlp, prefix: str = "mlp.") -> torch.Tensor:
    """Returns the input (..., i) of the down projection for normed states x (..., c).

    prefix: of the weights' names; an expert's is `mlp.experts.{e}.`.
    """
    projected = [F.linear(x, weights[prefix + name], weights.get(f"{prefix}{name}_bias")) for name in mlp.inputs]
    return activated(projected, mlp, weights, prefix)


def activated(projected: Sequence[torch.Tensor], mlp: Mlp, weights: LayerWeights, prefix: str) -> torch.Tensor:
    """Returns the input (..., i) of the down projection for the outputs (..., i) of the projections before it.

    prefix: as of `mlp_activation`.
    """
    if mlp.activation == "xielu":
        return _xielu(projected[0], *(weights[prefix + name] for name in XIELU))
    if not mlp.gated:
        return ACTIVATIONS[mlp.activation](projected[0])
    gate, up = projected
    if mlp.limit is not None:
        gate, up = gate.clamp(max=mlp.limit), up.clamp(-mlp.limit, mlp.limit)
    return ACTIVATIONS[mlp.activation](gate) * (up + mlp.up_shift if mlp.up_shift else up)


def _xielu(
    x: torch.Tensor, alpha_p: torch.Tensor, alpha_n: torch.Tensor, beta: torch.Tensor, eps: torch.Tensor
) -> torch.Tensor:
    """Returns xIELU of x (Huang and Schlag 2024, arXiv 2411.13010), whose parameters are learned."""
    positive, negative = F.softplus(alpha_p), beta + F.softplus(alpha_n)
    return torch.where(x > 0, positive * x * x, (torch.expm1(torch.minimum(x, eps)) - x) * negative) + beta * x


def routed(x: torch.Tensor, weights: LayerWeights, experts: Experts) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the experts (n, num_experts_per_tok) int64 of each token and their shares, of the same shape, fp32.

    x: normed states (n, c).
    """
    logits = F.linear(x, weights["mlp.router"], weights.get("mlp.router_bias"))  # (n, num_experts)
    shares, chosen = logits.softmax(dim=-1).topk(experts.num_experts_per_tok, dim=-1)
    return chosen, shares / shares.sum(dim=-1, keepdim=True) if experts.normalised else shares


def expert_tokens(chosen: torch.Tensor, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the tokens that take an expert: their numbers and, of each, the column in which the expert stands.

    chosen: (n, num_experts_per_tok) int64, as from `routed`. Both results are int64 (tokens of the expert,).
    """
    return torch.where(chosen == expert)


def experts_output(x: torch.Tensor, weights: LayerWeights, mlp: Mlp) -> torch.Tensor:
    """Returns the weighted sum (b, t, c) of each token's experts for normed states x (b, t, c)."""
    flat = x.flatten(0, 1)  # (n, c)
    chosen, shares = routed(flat, weights, mlp.experts)
    output = torch.zeros_like(flat)
    for expert in range(mlp.experts.num_experts):
        tokens, columns = expert_tokens(chosen, expert)
        if len(tokens):
            prefix = f"mlp.experts.{expert}."
            inner = mlp_activation(flat[tokens], weights, mlp, prefix)  # (tokens of this expert, i)
            outputs = F.linear(inner, weights[prefix + "down"], weights.get(f"{prefix}down_bias"))  # (tokens, c)
            output = output.index_add(0, tokens, outputs * shares[tokens, columns, None])
    return output.view_as(x)
