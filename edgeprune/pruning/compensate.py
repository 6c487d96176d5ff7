"""The closed-form update of the kept input features of a linear layer after others were removed.

Pure: arrays in, arrays out; it does not know which module the layer belongs to. With the kept inputs X_S, the
kept columns W_S of the weight and a target output T, the update is the least squares solution for the residual R,
shrunk toward the original columns:

    dW = R^T X_S (X_S^T X_S + g I)^-1,   R = T - X_S W_S^T

It minimises ||T - X_S (W_S + dW)^T||^2 + g ||dW||^2. With the symmetric target T = X W^T, the
projection's own output, this is W_P G_PS (G_SS + g I)^-1 (Shen et al. 2025, eq. 8, written without its
two inverses). The teacher target takes the residual stream back to that of the dense model:
T = h_dense_after - h_before, so that a module also makes up for what the modules before it have lost.
The update is linear in T: the update of a blend of two targets is the same blend of their updates.

Notation: S the kept features, P the pruned ones, G = X^T X the moments; n tokens that are solved on.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from edgeprune.pruning.linear import cholesky, solved
from edgeprune.pruning.moments import Moments, cross, held_out_rows

DAMPINGS = tuple(10.0 ** (step / 2) for step in range(-8, 5))
"""The dampings g / mean(diag G_SS) that are tried, 1e-4 to 100; the error on held-out samples decides."""

FIRST_DAMPING = 0.1
PROBED_OUTPUTS = 64
"""Output features on which damping and blend are chosen, at most: enough to average over, cheap for wide models."""

SOLVED_OUTPUTS = 512
"""Output features that are solved for at a time, in fp64."""

MOMENT_DAMPING = 1e-2
"""Added to the moments as a share of their mean diagonal: few samples determine few directions."""


@dataclass(frozen=True)
class Compensation:
    """The updated columns of a weight, and how good the update is.

    weight: (out_features, kept) fp32; damping: None where no update lowered the error, and the weight is unchanged;
    blend: share of the teacher target, 0 to 1; error_before, error_after: ||T - X_S W'^T||^2 / ||T||^2 for the
    teacher target on the held-out samples.
    """

    weight: torch.Tensor
    damping: float | None
    blend: float
    error_before: float
    error_after: float


def least_squares_update(
    moments: torch.Tensor, cross: torch.Tensor, damping: float, less: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns the transposed update (G_SS + g I)^-1 X_S^T R with g = damping * mean(diag G_SS).

    moments: (kept, kept) fp64, G_SS; cross: (kept, out_features) fp64, X_S^T R, which is consumed; less: (kept,
    kept), moments that are subtracted from G_SS. Returns (kept, out_features) fp64. Raises NumericalError if the
    moments are not finite.
    """
    return solved(cholesky(moments, damping, less), cross)


def compensate(
    weight: torch.Tensor,
    moments: Moments,
    inputs: torch.Tensor,
    lost: torch.Tensor,
    teacher: torch.Tensor,
    first_damping: float = FIRST_DAMPING,
) -> Compensation:
    """Returns the update with the damping and the blend of targets that come closest to the teacher target.

    Damping and blend are chosen by the error on held-out samples, with the update solved on the other samples; the
    final solve uses all samples. weight: (out_features, kept) fp32, the kept columns; moments: X_S^T X_S; inputs:
    (samples, tokens, kept) fp32, X_S; lost: (samples, tokens, out_features) fp32, X_P W_P^T, the output of the removed
    features, which is the residual of the symmetric target; teacher: (samples, tokens, out_features) fp32, the teacher
    target. The last two are consumed. first_damping: of DAMPINGS, where their search starts. Raises NumericalError if
    the moments are not finite.
    """
    held = held_out_rows(*inputs.shape[:2])  # (n,)
    # (n, kept), (n, out_features), (n, out_features)
    inputs, lost, teacher = (states.flatten(0, 1) for states in (inputs, lost, teacher))
    energy = float(teacher[held].square().sum(dtype=torch.float64)) or 1.0
    # From here on `teacher` is the residual of the teacher target, T - X_S W_S^T.
    teacher.addmm_(inputs, weight.T, alpha=-1)
    before = float(teacher[held].square().sum(dtype=torch.float64)) / energy
    choice = _choose(moments, inputs, lost, teacher, held, first_damping)
    if choice is None:
        return Compensation(weight, None, 0.0, before, before)
    damping, blend, share = choice
    # Solve on all samples for the blend of both residuals.
    residual = lost.lerp_(teacher, blend)  # (n, out_features)
    del teacher
    factor, updated = cholesky(moments.all, damping), weight.clone()
    for columns, targets in zip(updated.split(SOLVED_OUTPUTS), residual.split(SOLVED_OUTPUTS, dim=1), strict=True):
        columns += solved(factor, cross(inputs, targets)).T.float()
    return Compensation(updated, damping, blend, before, before * share)


def _choose(
    moments: Moments,
    inputs: torch.Tensor,
    own: torch.Tensor,
    teacher: torch.Tensor,
    held: torch.Tensor,
    first_damping: float,
) -> tuple[float, float, float] | None:
    """Returns damping, blend and the share of the teacher's squared residual that is left; None where no update
    lowers it.

    inputs: (n, kept); own, teacher: (n, out_features), the residuals of the symmetric and of the teacher target; held:
    (n,) bool. The error is quadratic in the blend, so that the best blend is a division. The dampings are searched
    upward and downward from the first.
    """
    outputs = own.shape[1]
    # Some of the output features are enough to choose on.
    probed = torch.arange(0, outputs, -(-outputs // PROBED_OUTPUTS))
    residuals = torch.cat([own[:, probed], teacher[:, probed]], dim=1)  # (n, 2 * probed)
    # What the other tokens give: that of all tokens less that of the held-out ones.
    fit_cross = cross(inputs, residuals)  # (kept, 2 * probed)
    inputs, residuals = inputs[held], residuals[held]  # of the held-out tokens from here on
    fit_cross -= cross(inputs, residuals)
    own, teacher = residuals.chunk(2, dim=1)

    @functools.cache
    def attempt(step: int) -> tuple[float, float]:
        """Returns the held-out error with DAMPINGS[step] at its best blend, and that blend."""
        update = least_squares_update(moments.all, fit_cross.clone(), DAMPINGS[step], moments.held_out).float()
        by_own, by_teacher = (inputs @ update).chunk(2, dim=1)  # (held-out tokens, probed)
        # Minimise ||left - blend * turn||^2 over the blend, within 0 and 1.
        left, turn = teacher - by_own, by_teacher - by_own
        gain, size = (float((turn * other).sum(dtype=torch.float64)) for other in (left, turn))
        blend = min(max(gain / size, 0.0), 1.0) if size > 0 else 0.0
        return float((left - blend * turn).square().sum(dtype=torch.float64)), blend

    # Walk from the first damping in either direction as long as the error falls.
    best = DAMPINGS.index(first_damping)
    for direction in (1, -1):
        while 0 <= best + direction < len(DAMPINGS) and attempt(best + direction) < attempt(best):
            best += direction
    error, blend = attempt(best)
    before = float(teacher.square().sum(dtype=torch.float64))
    return (DAMPINGS[best], blend, error / before) if error < before else None


def nested_errors(weight: torch.Tensor, moments: torch.Tensor, order: torch.Tensor, least: int = 0) -> torch.Tensor:
    """Returns the error left after compensation when the first k features of `order` are kept, for k from `least` on.

    With L the Cholesky factor of the moments in that order, the Schur complement of the kept block is
    L_PP L_PP^T, so that the least squares error is ||L_PP^T W_P||^2: the sum of the rows from k on of
    L^T W, because L is lower triangular. One factorisation gives all widths.

    weight: (out_features, in_features) fp32; moments: (in_features, in_features) fp64; order: a
    permutation (in_features,), most important first. Returns (in_features - least + 1,) fp64, falling, 0 at the end.
    Raises NumericalError if the moments are not finite.
    """
    factor = cholesky(moments, MOMENT_DAMPING, order=order)[least:, least:]  # of L, (removed, removed) at most
    # Sums of squares need no fp64 products.
    rows = (factor.T.float() @ weight.T[order[least:]]).square_().sum(dim=1, dtype=torch.float64)  # (removed,)
    # The sum of the rows from k on, for every k.
    errors = torch.zeros(len(rows) + 1, dtype=torch.float64)
    errors[:-1] = rows.flip(0).cumsum(0).flip(0)
    return errors
