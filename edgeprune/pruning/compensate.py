"""The closed-form update of the kept input features of a linear layer after others were removed.

Pure: arrays in, arrays out. With y = X W^T, kept features S and removed features P, the kept
columns take over what the removed ones gave:

    W_S <- W_S + W_P G_PS (G_SS + g I)^-1,   G = X^T X

which minimises ||X W^T - X_S W_S'^T||^2 + g ||W_S' - W_S||^2 (Shen et al. 2025, eq. 8, written
without its two inverses). The damping g shrinks toward the original weights, not toward zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from edgeprune.pruning.moments import Moments
from edgeprune.pruning.score import cholesky

DAMPINGS = (1e-3, 1e-2, 1e-1, 1.0)
"""Candidates for g / mean(diag G); the held-out samples choose."""

MOMENT_DAMPING = 1e-2
"""Added to the moments as a share of their mean diagonal: few samples know few directions."""


@dataclass(frozen=True)
class Compensation:
    """weight: (out_features, kept) fp32. Errors are ||X W^T - X_S W'^T||^2 / ||X W^T||^2 on the
    held-out samples, before and after; damping is None where no update lowered the error."""

    weight: torch.Tensor
    damping: float | None
    error_before: float
    error_after: float


def least_squares_update(
    weight: torch.Tensor, gram: torch.Tensor, kept: torch.Tensor, removed: torch.Tensor, damping: float
) -> torch.Tensor:
    """W_P G_PS (G_SS + g I)^-1 with g = damping * mean(diag G_SS).

    weight: (out_features, in_features) fp64; gram: (in_features, in_features) fp64; kept and
    removed: index vectors. Returns (out_features, kept) fp64.
    """
    factor = cholesky(gram[kept][:, kept], damping)
    cross = gram[kept][:, removed] @ weight[:, removed].T  # (kept, out_features)
    return torch.cholesky_solve(cross, factor).T


def compensate(weight: torch.Tensor, moments: Moments, kept: torch.Tensor) -> Compensation:
    """The update with the damping that reconstructs the held-out samples best.

    The damping is chosen on moments.held_out with moments.fit solved; the final solve uses both.
    weight: (out_features, in_features) fp32; kept: sorted indices of the kept features.
    """
    original, target = weight.dtype, weight.double()
    is_removed = torch.ones(weight.shape[1], dtype=torch.bool)
    is_removed[kept] = False
    removed = is_removed.nonzero().squeeze(1)
    if len(removed) == 0:
        return Compensation(weight, None, 0.0, 0.0)
    held_out = moments.held_out
    kept_gram = held_out[kept][:, kept]
    cross = target[:, removed] @ held_out[removed][:, kept]  # (out_features, kept)
    lost = float((target[:, removed] @ held_out[removed][:, removed]).mul_(target[:, removed]).sum())
    energy = float((target @ held_out).mul_(target).sum()) or 1.0

    def error(update: torch.Tensor) -> float:
        return lost - 2 * float((cross * update).sum()) + float((update @ kept_gram).mul_(update).sum())

    best, best_error = None, lost
    for damping in DAMPINGS:
        candidate = error(least_squares_update(target, moments.fit, kept, removed, damping))
        if candidate < best_error:
            best, best_error = damping, candidate
    kept_weight = target[:, kept]
    if best is not None:
        kept_weight = kept_weight + least_squares_update(target, moments.all, kept, removed, best)
    return Compensation(kept_weight.to(original), best, lost / energy, best_error / energy)


def nested_errors(weight: torch.Tensor, gram: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Error left after compensation when the first k features of `order` are kept, for every k.

    With L the Cholesky factor of the moments in that order, the Schur complement of the kept block is
    L_PP L_PP^T, so that the least squares error is ||L_PP^T W_P||^2: the sum of the rows from k on of
    L^T W, because L is lower triangular. One factorisation gives all widths.

    weight: (out_features, in_features) fp32; gram: (in_features, in_features) fp64; order: a
    permutation, most important first. Returns (in_features + 1,) fp64, falling, 0 at the end.
    """
    factor = cholesky(gram[order][:, order], MOMENT_DAMPING)
    rows = (factor.T @ weight.double().T[order]).square().sum(dim=1)
    errors = torch.zeros(len(rows) + 1, dtype=torch.float64)
    errors[:-1] = rows.flip(0).cumsum(0).flip(0)
    return errors
