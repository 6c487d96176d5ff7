"""Second moments of a module's inputs, accumulated in chunks: fp32 products, fp64 sums."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Moments:
    """Uncentred second moments X^T X (features, features) fp64, of two disjoint sets of samples.

    `fit` is what the closed form solves on; `held_out` is what chooses its damping.
    """

    fit: torch.Tensor
    held_out: torch.Tensor

    @property
    def all(self) -> torch.Tensor:
        return self.fit + self.held_out


def gram(inputs: torch.Tensor, chunk: int = 2048) -> torch.Tensor:
    """inputs (n, features) fp32 -> X^T X (features, features) fp64, exactly symmetric."""
    features = inputs.shape[1]
    total = torch.zeros(features, features, dtype=torch.float64)
    for rows in inputs.split(chunk):
        total += rows.T @ rows
    return torch.tril(total) + torch.tril(total, -1).T


def split_moments(inputs: torch.Tensor) -> Moments:
    """inputs (samples, tokens, features) -> moments of three quarters and of one quarter of them.

    Whole samples are held out where there are at least four, else the last quarter of each.
    """
    features = inputs.shape[2]
    if len(inputs) >= 4:
        held_out = torch.arange(len(inputs)) % 4 == 3
        parts = inputs[~held_out], inputs[held_out]
    else:
        cut = max(1, inputs.shape[1] * 3 // 4)
        parts = inputs[:, :cut], inputs[:, cut:]
    return Moments(*(gram(part.reshape(-1, features)) for part in parts))
