"""Second moments of a module's inputs, accumulated in chunks: fp32 products, fp64 sums.

Pure: arrays in, arrays out; it does not know which module the inputs belong to.
"""

from __future__ import annotations

import torch

CHUNK = 2048  # tokens of one fp32 product
BLOCK = 512  # features of one product


def gram(inputs: torch.Tensor, chunk: int = CHUNK) -> torch.Tensor:
    """Returns X^T X (features, features) fp64, exactly symmetric, of the inputs X (n, features) fp32.

    Only blocks on and below the diagonal are multiplied: half the work, and no fp32 copy of the whole.
    """
    # The blocks on and below the diagonal.
    features = inputs.shape[1]
    total = torch.zeros(features, features, dtype=torch.float64)
    for rows in inputs.split(chunk):
        for start in range(0, features, BLOCK):
            total[start:, start : start + BLOCK] += rows[:, start:].T @ rows[:, start : start + BLOCK]
    # Mirror them above the diagonal, within the blocks on it too.
    for start in range(0, features, BLOCK):
        end = min(start + BLOCK, features)
        total[start:end, end:] = total[end:, start:end].T
        corner = total[start:end, start:end]
        corner.copy_(corner.tril() + corner.tril(-1).T)
    return total


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
