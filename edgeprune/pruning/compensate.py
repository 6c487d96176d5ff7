"""The closed-form update of the kept input features of a linear layer after others were removed.

Pure: arrays in, arrays out. With kept inputs X_S, the kept columns W_S of the weight and a target
output T, the update is the least squares solution on what is left, shrunk toward the original columns:

    dW = R^T X_S (X_S^T X_S + g I)^-1,   R = T - X_S W_S^T

It minimises ||T - X_S (W_S + dW)^T||^2 + g ||dW||^2. With the symmetric target T = X W^T, the
projection's own output, this is W_P G_PS (G_SS + g I)^-1 (Shen et al. 2025, eq. 8, written without its
two inverses). The teacher target is what takes the residual stream back to that of the dense model:
T = h_dense_after - h_before, so that a module also makes up for what was lost in those before it.
The update is linear in T: a blend of targets is the blend of the updates.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from edgeprune.pruning.linear import cholesky
from edgeprune.pruning.moments import cross, gram, held_out_rows

DAMPINGS = tuple(10.0 ** (step / 2) for step in range(-8, 5))
"""Candidates for g / mean(diag G_SS), 1e-4 to 100; the held-out samples choose."""

FIRST_DAMPING = DAMPINGS.index(0.1)
PROBED_OUTPUTS = 128
"""Output features that damping and blend are chosen on: enough to average over, cheap for wide models."""

MOMENT_DAMPING = 1e-2
"""Added to the moments as a share of their mean diagonal: few samples know few directions."""


@dataclass(frozen=True)
class Compensation:
    """weight: (out_features, kept) fp32. blend: share of the teacher target, 0 to 1. Errors are
    ||T - X_S W'^T||^2 / ||T||^2 for the teacher target on the held-out samples, before and after;
    damping is None where no update lowered the error, and the weight is as it was given."""

    weight: torch.Tensor
    damping: float | None
    blend: float
    error_before: float
    error_after: float


def least_squares_update(moments: torch.Tensor, cross: torch.Tensor, damping: float) -> torch.Tensor:
    """(G_SS + g I)^-1 X_S^T R with g = damping * mean(diag G_SS): the update, transposed.

    moments: (kept, kept) fp64; cross: (kept, out_features) fp64. Returns (kept, out_features) fp64.
    """
    return torch.cholesky_solve(cross, cholesky(moments, damping))


def compensate(
    weight: torch.Tensor, moments: torch.Tensor, inputs: torch.Tensor, lost: torch.Tensor, teacher: torch.Tensor
) -> Compensation:
    """The update with the damping and the blend of targets that come closest to the teacher on held-out samples.

    Both are chosen with the update solved on the other samples; the final solve uses all.
    weight: (out_features, kept) fp32, the kept columns; moments: (kept, kept) fp64, X_S^T X_S of all
    tokens; inputs: (samples, tokens, kept) fp32, X_S; lost: (samples, tokens, out_features) fp32,
    X_P W_P^T, what the symmetric target has over the output of the kept features; teacher: the same
    shape, the teacher target. Both are consumed.
    """
    held = held_out_rows(*inputs.shape[:2])
    inputs, lost, teacher = (states.flatten(0, 1) for states in (inputs, lost, teacher))
    energy = float(teacher[held].square().sum(dtype=torch.float64)) or 1.0
    teacher.addmm_(inputs, weight.T, alpha=-1)
    before = float(teacher[held].square().sum(dtype=torch.float64)) / energy
    choice = _choose(moments, inputs, lost, teacher, held)
    if choice is None:
        return Compensation(weight, None, 0.0, before, before)
    damping, blend, share = choice
    residual = lost.lerp_(teacher, blend)
    update = least_squares_update(moments, cross(inputs, residual), damping)
    return Compensation(weight + update.T.float(), damping, blend, before, before * share)


def _choose(
    moments: torch.Tensor, inputs: torch.Tensor, own: torch.Tensor, teacher: torch.Tensor, held: torch.Tensor
) -> tuple[float, float, float] | None:
    """Damping, blend and the share of the teacher's residual that is left; None where nothing lowers it.

    inputs (n, kept), own and teacher (n, out_features), the residuals; held: (n,) bool. The error is
    quadratic in the blend, so that its best value is a division; the dampings are searched uphill and
    downhill from the middle of their range.
    """
    outputs = own.shape[1]
    probed = torch.arange(0, outputs, -(-outputs // PROBED_OUTPUTS))
    residuals = torch.cat([own[:, probed], teacher[:, probed]], dim=1)
    fit_cross = cross(inputs, residuals)
    inputs, residuals = inputs[held], residuals[held]
    fit_cross -= cross(inputs, residuals)
    fit_moments = gram(inputs).neg_().add_(moments)
    own, teacher = residuals.chunk(2, dim=1)

    @functools.cache
    def attempt(step: int) -> tuple[float, float]:
        """The error with DAMPINGS[step], and its blend."""
        update = least_squares_update(fit_moments, fit_cross, DAMPINGS[step]).float()
        by_own, by_teacher = (inputs @ update).chunk(2, dim=1)
        left, turn = teacher - by_own, by_teacher - by_own
        gain, size = (float((turn * other).sum(dtype=torch.float64)) for other in (left, turn))
        blend = min(max(gain / size, 0.0), 1.0) if size > 0 else 0.0
        return float((left - blend * turn).square().sum(dtype=torch.float64)), blend

    best = FIRST_DAMPING
    for direction in (1, -1):
        while 0 <= best + direction < len(DAMPINGS) and attempt(best + direction) < attempt(best):
            best += direction
    error, blend = attempt(best)
    before = float(teacher.square().sum(dtype=torch.float64))
    return (DAMPINGS[best], blend, error / before) if error < before else None


def nested_errors(weight: torch.Tensor, moments: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Error left after compensation when the first k features of `order` are kept, for every k.

    With L the Cholesky factor of the moments in that order, the Schur complement of the kept block is
    L_PP L_PP^T, so that the least squares error is ||L_PP^T W_P||^2: the sum of the rows from k on of
    L^T W, because L is lower triangular. One factorisation gives all widths.

    weight: (out_features, in_features) fp32; moments: (in_features, in_features) fp64; order: a
    permutation, most important first. Returns (in_features + 1,) fp64, falling, 0 at the end.
    """
    factor = cholesky(moments[order][:, order], MOMENT_DAMPING)
    rows = (factor.T @ weight.double().T[order]).square().sum(dim=1)
    errors = torch.zeros(len(rows) + 1, dtype=torch.float64)
    errors[:-1] = rows.flip(0).cumsum(0).flip(0)
    return errors
