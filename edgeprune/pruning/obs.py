"""Greedy removal of groups of features with the Optimal Brain Surgeon's update of the rest.

Pure: arrays in, arrays out; it does not know which module the features belong to.
"""

from __future__ import annotations

import torch

COMPACTED_AT = 0.3  # share of removed units at which the arrays are copied to hold only the others


def saliencies(weight: torch.Tensor, inverse: torch.Tensor, unit: int) -> torch.Tensor:
    """Returns 1/2 tr(W_g^T [(G^-1)_gg]^-1 W_g) (units,) fp64 of every unit g.

    It is the least rise of 1/2 ||dY||^2 that the removal of unit g alone causes, with the other weights refitted.
    weight: (features, out_features); inverse: (features, features), G^-1; both fp64.
    """
    if unit == 1:
        return weight.square().sum(dim=1) / inverse.diagonal() / 2
    units = len(weight) // unit
    blocks = inverse.view(units, unit, units, unit).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    # blocks: (units, unit, unit), the diagonal blocks of G^-1
    rows = weight.view(units, unit, -1)  # (units, unit, out_features)
    return (rows * torch.linalg.solve(blocks, rows)).sum(dim=(1, 2)) / 2


def greedy_order(weight: torch.Tensor, inverse: torch.Tensor, unit: int, keep: int, batch: int) -> torch.Tensor:
    """Returns scores (units,) fp64: negative ones of removed units in the order of their removal, and the final
    saliencies of the `keep` units that stay.

    weight: (features, out_features); inverse: (features, features), G^-1; both fp64 and consumed. In each round the
    `batch` units of least saliency are removed, and W and G^-1 are downdated:
    W <- W - G^-1_:q (G^-1_qq)^-1 W_q with the features q of these units, and the same for G^-1. Both are changed in
    place, because they are the largest arrays of a pruning.
    """
    scores = torch.zeros(len(weight) // unit, dtype=torch.float64)
    names = torch.arange(len(scores))  # the original index of each unit that the arrays still hold
    gone = torch.zeros(len(scores), dtype=torch.bool)  # units that are removed but still in the arrays
    removed, to_remove = 0, len(scores) - max(keep, 1)
    while True:
        costs = saliencies(weight, inverse, unit)
        # Score the units that stay once all others are removed.
        if removed == to_remove:
            scores[names[~gone]] = costs[~gone]
            return scores
        # Remove the units of least saliency; a later removal scores higher.
        least = torch.sort(costs.masked_fill(gone, torch.inf), stable=True).indices[: min(batch, to_remove - removed)]
        scores[names[least]] = torch.arange(len(least), dtype=torch.float64) + (removed - to_remove)
        removed += len(least)
        gone[least] = True
        # Downdate both arrays through the Cholesky factor of G^-1_qq.
        q = _features(least, unit)
        rows = inverse[q]  # (len(q), features)
        factor = torch.linalg.cholesky(rows[:, q])
        rows = torch.linalg.solve_triangular(factor, rows, upper=False)
        weight.addmm_(rows.T, torch.linalg.solve_triangular(factor, weight[q], upper=False), alpha=-1)
        inverse.addmm_(rows.T, rows, alpha=-1)
        inverse[q, q] = 1.0  # all else of these rows is zero now
        # Shrink the arrays once enough of their units are removed.
        if float(gone.double().mean()) > COMPACTED_AT:
            stays = (~gone).nonzero().squeeze(1)
            s = _features(stays, unit)
            weight, inverse, names, gone = weight[s], inverse[s[:, None], s], names[stays], gone[stays]


def _features(units: torch.Tensor, unit: int) -> torch.Tensor:
    return (units[:, None] * unit + torch.arange(unit)).flatten()
