"""The relaxed pruning mask of Shen et al. 2025 (arXiv 2412.12441): a quadratic problem in z.

    min_z  1/2 (z - 1)^T A (z - 1) + lambda/2 (<1, z> - r)^2,    A = (W W^T) o G summed over each unit

Pure: arrays in, arrays out; it does not know which module the units belong to. A is scaled to a mean diagonal of 1,
and RIDGE keeps it positive definite.
"""

from __future__ import annotations

import torch

from edgeprune.pruning.linear import cholesky, solved
from edgeprune.pruning.moments import BLOCK

RIDGE = 1e-6
TOLERANCE = 1e-10
MAX_STEPS = 200
SHORTEST = 1e-12  # of a Newton step, after which no objective falls any more


def interaction(weight: torch.Tensor, gram: torch.Tensor, unit: int) -> torch.Tensor:
    """Returns A (units, units) fp64 from weight (out_features, in_features) and gram (in_features, in_features)."""
    # One block of columns at a time, so that W W^T is never held as a whole.
    matrix = gram.clone()
    for start in range(0, len(gram), BLOCK):
        matrix[:, start : start + BLOCK] *= weight.T @ weight[:, start : start + BLOCK]
    if unit > 1:
        units = len(gram) // unit
        matrix = matrix.view(units, unit, units, unit).sum(dim=(1, 3))
    return matrix


def unconstrained(matrix: torch.Tensor) -> torch.Tensor:
    """Returns u = A^-1 1 (units,): without the bounds the optimum is z = 1 - c u with the same c > 0 for all units.

    matrix: A (units, units) fp64. Raises NumericalError if it is not finite.
    """
    ones = torch.ones(len(matrix), 1, dtype=torch.float64)
    return solved(cholesky(matrix, RIDGE), ones).squeeze(1)


def box_constrained(matrix: torch.Tensor, total: float, penalty: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the optimum z (units,) under 0 <= z <= 1 and the objective's gradient (units,) at it.

    It takes projected Newton steps (Bertsekas 1982): units that the gradient pushes against a bound stay there, the
    others take the Newton step of their own block, projected to the bounds, with a backtracking line search.
    matrix: A (units, units) fp64; total: r, the units to keep; penalty: lambda in units of 1 / (1^T A^-1 1). At the
    end max |z - clip(z - gradient)| is below 1e-10 of the mean diagonal of A. Raises NumericalError if the matrix is
    not finite.
    """
    # Scale the problem, so that the tolerances do not depend on the size of weights and inputs.
    scale = float(matrix.diagonal().mean()) or 1.0
    hessian = matrix / scale
    del matrix  # freed where nobody else holds it
    hessian.diagonal().add_(RIDGE)
    inverse_ones = unconstrained(hessian)
    weight = penalty / float(inverse_ones.sum())
    units = len(hessian)

    def gradient_at(z: torch.Tensor) -> torch.Tensor:
        return hessian @ (z - 1) + weight * (z.sum() - total)

    def objective(z: torch.Tensor) -> float:
        return float((z - 1) @ hessian @ (z - 1) + weight * (z.sum() - total) ** 2) / 2

    # Start at the optimum without bounds, clipped to them.
    z = (1 - inverse_ones * ((units - total) * weight / (1 + penalty))).clamp(0, 1)
    for _ in range(MAX_STEPS):
        gradient = gradient_at(z)
        residual = float((z - (z - gradient).clamp(0, 1)).abs().max())
        if residual < TOLERANCE:
            break
        # Hold the units at a bound, and take the Newton step of the others.
        near = min(residual, 1e-3)
        held = ((z <= near) & (gradient > 0)) | ((z >= 1 - near) & (gradient < 0))
        free = (~held).nonzero().squeeze(1)
        step = -gradient / (hessian.diagonal() + weight)
        if len(free):
            block = hessian[free[:, None], free].add_(weight).mT  # column-major: factorised in place
            torch.linalg.cholesky(block, out=block)
            step[free] = -solved(block, gradient[free, None]).squeeze(1)
        # Halve the step until the objective falls enough (Armijo's rule).
        length, before = 1.0, objective(z)
        while True:
            trial = (z + length * step).clamp(0, 1)
            if objective(trial) <= before + 1e-4 * float(gradient @ (trial - z)) or length < SHORTEST:
                break
            length /= 2
        z = trial
        if length < SHORTEST:
            break  # what is left is rounding
    return z, gradient_at(z)
