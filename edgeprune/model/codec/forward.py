"""The steps of a VQ model in torch, fp32, on whole feature maps. It knows no files and no codes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F

from edgeprune.model.codec.layers import GROUPS, NORM_EPS, CodecStep

Weights = Mapping[str, torch.Tensor]


@torch.no_grad()
def walk(steps: Iterable[CodecStep], weights: Weights, x: torch.Tensor) -> torch.Tensor:
    """Applies steps to x (b, inputs of the first step, h, w) fp32; returns (b, outputs of the last step, ...) fp32."""
    for step in steps:
        x = _applied(step, weights, x)
    return x


@torch.no_grad()
def nearest(rows: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Returns for rows (n, d) fp32 the row of the table (m, d) fp32 at the least squared distance, (n,) int64."""
    # |t - r|^2 less |r|^2, which is the same for the whole table
    return (table.square().sum(1) - 2 * rows @ table.T).argmin(1)  # (n, m) -> (n,)


def _applied(step: CodecStep, weights: Weights, x: torch.Tensor) -> torch.Tensor:
    """Applies one step to x (b, inputs, h, w); returns (b, outputs, ...)."""
    name = step.name
    match step.kind:
        case "point" | "conv":
            return _conv(weights, name, x)
        case "upsample":
            return _conv(weights, f"{name}.conv", F.interpolate(x, scale_factor=2.0, mode="nearest"))  # (b, c, 2h, 2w)
        case "downsample":
            return _conv(weights, f"{name}.conv", F.pad(x, (0, 1, 0, 1)), stride=2, padding=0)  # (b, c, h/2, w/2)
        case "activation":
            return F.silu(_norm(weights, name, x))
        case "attention":
            return x + _attention(weights, name, x)
    # The remaining kind is a residual step.
    inner = _conv(weights, f"{name}.conv1", F.silu(_norm(weights, f"{name}.norm1", x)))
    inner = _conv(weights, f"{name}.conv2", F.silu(_norm(weights, f"{name}.norm2", inner)))
    return inner + (x if step.inputs == step.outputs else _conv(weights, f"{name}.nin_shortcut", x))


def _attention(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    """Returns softmax(q k^T / sqrt(channels)) v over all positions, in one head: x (b, c, h, w) -> the same shape."""
    normed = _norm(weights, f"{name}.norm", x)
    q, k, v = (_conv(weights, f"{name}.{part}", normed).flatten(2).transpose(1, 2) for part in "qkv")  # (b, h * w, c)
    context = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)  # (b, c, h, w)
    return _conv(weights, f"{name}.proj_out", context)


def _conv(weights: Weights, name: str, x: torch.Tensor, stride: int = 1, padding: int | None = None) -> torch.Tensor:
    weight = weights[f"{name}.weight"]
    padding = weight.shape[-1] // 2 if padding is None else padding
    return F.conv2d(x, weight, weights[f"{name}.bias"], stride, padding)


def _norm(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    return F.group_norm(x, GROUPS, weights[f"{name}.weight"], weights[f"{name}.bias"], NORM_EPS)
