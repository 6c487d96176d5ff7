"""Second moments of a module's inputs, accumulated in chunks: fp32 products, fp64 sums (fp32 of held-out tokens).

Pure: arrays in, arrays out; it does not know which module the inputs belong to.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

CHUNK = 2048  # tokens of one fp32 product
BLOCK = 256  # features of one product


def gram(inputs: torch.Tensor, chunk: int = CHUNK) -> torch.Tensor:
    """Returns X^T X (features, features) fp64, exactly symmetric, of the inputs X (n, features) fp32."""
    total = torch.zeros(inputs.shape[1], inputs.shape[1], dtype=torch.float64)
    for rows in inputs.split(chunk):
        _add_products(total, rows)
    return _mirrored(total)


def _add_products(total: torch.Tensor, rows: torch.Tensor) -> None:
    """Adds X^T X of rows X (n, features) to the blocks on and below the diagonal of total (features, features).

    Only these are multiplied: half the work, and no fp32 copy of the whole.
    """
    for start in range(0, len(total), BLOCK):
        total[start:, start : start + BLOCK] += rows[:, start:].T @ rows[:, start : start + BLOCK]


def _mirrored(total: torch.Tensor) -> torch.Tensor:
    """Mirrors what is below the diagonal above it, in place, within the blocks on it too; returns it."""
    for start in range(0, len(total), BLOCK):
        end = min(start + BLOCK, len(total))
        total[start:end, end:] = total[end:, start:end].T
        corner = total[start:end, start:end]
        corner.copy_(corner.tril() + corner.tril(-1).T)
    return total


@dataclass(frozen=True)
class Moments:
    """The second moments (features, features) of so many tokens: of all of them, fp64, and of the held-out ones, fp32.

    The latter weigh errors, and are a small share of what they are subtracted from.
    """

    tokens: int
    all: torch.Tensor
    held_out: torch.Tensor


def moments_of(inputs: torch.Tensor, total: torch.Tensor | None = None) -> Moments:
    """Returns the moments of inputs (samples, tokens, features) fp32; total: (features, features), those of all where
    they are known."""
    rows, is_held_out = inputs.flatten(0, 1), held_out_rows(*inputs.shape[:2])  # (n, features), (n,)
    features = rows.shape[1]
    held_out = torch.zeros(features, features)
    others = torch.zeros(features, features, dtype=torch.float64) if total is None else None
    # Some tokens at a time, each multiplied once.
    for part, is_held in zip(rows.split(CHUNK), is_held_out.split(CHUNK), strict=True):
        _add_products(held_out, part[is_held])
        if others is not None:
            _add_products(others, part[~is_held])
    _mirrored(held_out)
    if others is not None:
        total = _mirrored(others)
        for start in range(0, features, BLOCK):  # which become fp64 some at a time
            total[start : start + BLOCK] += held_out[start : start + BLOCK]
    return Moments(len(rows), total, held_out)


def evened(moments: Moments, inputs: torch.Tensor, first: float) -> Moments:
    """Returns moments in which the first token of each sample counts as one, not as so many; consumes those given.

    inputs: (samples, tokens, features) fp32, that the moments are of.
    """
    if first == 1:
        return moments
    rows, excess = inputs[:, 0], 1 - 1 / first
    is_held_out = held_out_rows(*inputs.shape[:2]).view(inputs.shape[:2])[:, 0]
    held_out = rows[is_held_out]
    moments.all.sub_(gram(rows), alpha=excess)
    moments.held_out.sub_(held_out.T @ held_out, alpha=excess)
    return moments


def cross(inputs: torch.Tensor, outputs: torch.Tensor, chunk: int = CHUNK) -> torch.Tensor:
    """Returns X^T Y (features, out_features) fp64 of X (n, features) and Y (n, out_features), both fp32."""
    total = torch.zeros(inputs.shape[1], outputs.shape[1], dtype=torch.float64)
    for rows, targets in zip(inputs.split(chunk), outputs.split(chunk), strict=True):
        for start in range(0, len(total), BLOCK):
            total[start : start + BLOCK] += rows[:, start : start + BLOCK].T @ targets
    return total


def held_out_rows(samples: int, tokens: int) -> torch.Tensor:
    """Returns a mask (samples * tokens,) bool of the tokens that choose damping and blend, and are not solved on.

    These are the tokens of every fourth sample where there are at least four samples, else the last quarter of each.
    """
    if samples >= 4:
        held = (torch.arange(samples) % 4 == 3)[:, None].expand(samples, tokens)
    else:
        held = (torch.arange(tokens) >= max(1, tokens * 3 // 4)).expand(samples, tokens)
    return held.flatten()
