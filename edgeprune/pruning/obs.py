"""Greedy removal of groups of features with the Optimal Brain Surgeon's update of the rest.

Pure: arrays in, arrays out.
"""

from __future__ import annotations

import torch


def saliencies(weight: torch.Tensor, inverse: torch.Tensor, unit: int) -> torch.Tensor:
    """1/2 tr(W_g^T [(G^-1)_gg]^-1 W_g) (units,): the least rise of 1/2 ||dY||^2 when unit g goes alone.

    weight: (features, out_features); inverse: (features, features), G^-1; both fp64.
    """
    if unit == 1:
        return weight.square().sum(dim=1) / inverse.diagonal() / 2
    units = len(weight) // unit
    blocks = inverse.view(units, unit, units, unit).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    rows = weight.view(units, unit, -1)
    return (rows * torch.linalg.solve(blocks, rows)).sum(dim=(1, 2)) / 2


def greedy_order(weight: torch.Tensor, inverse: torch.Tensor, unit: int, keep: int, batch: int) -> torch.Tensor:
    """Scores (units,) fp64: negative for removed units, by the order in which they went; the `keep` that
    stay have their saliency at the end.

    In each round the `batch` units of least saliency go, and G^-1 and W are downdated with them:
    W <- W - G^-1_:q (G^-1_qq)^-1 W_q, and the same for G^-1. Both arguments are consumed.
    """
    weight, inverse = weight.contiguous(), inverse.contiguous()
    alive = torch.arange(len(weight) // unit)
    scores = torch.zeros(len(alive), dtype=torch.float64)
    removed, to_remove = 0, len(alive) - max(keep, 1)
    while True:
        costs = saliencies(weight, inverse, unit)
        if removed == to_remove:
            scores[alive] = costs
            return scores
        order = torch.sort(costs, stable=True).indices
        gone = order[: min(batch, to_remove - removed)]
        scores[alive[gone]] = torch.arange(len(gone), dtype=torch.float64) + (removed - to_remove)
        removed += len(gone)
        stays = order[len(gone) :].sort().values
        q, s = ((index[:, None] * unit + torch.arange(unit)).flatten() for index in (gone, stays))
        factor = torch.linalg.solve(inverse[q][:, q], inverse[q][:, s])  # (q, s)
        weight = weight[s] - factor.T @ weight[q]
        inverse = inverse[s][:, s] - inverse[s][:, q] @ factor
        alive = alive[stays]
