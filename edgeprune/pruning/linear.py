"""Factorisations of second moments that never fail on finite input, however few the samples.

Pure: arrays in, arrays out; it does not know which equations are solved with a factor.
"""

from __future__ import annotations

import torch

from edgeprune.errors import NumericalError

ROWS = 128  # of a matrix that are copied at a time


def cholesky(
    matrix: torch.Tensor, damping: float, less: torch.Tensor | None = None, order: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns the lower Cholesky factor of a symmetric matrix (n, n) fp64 with damping * mean(diagonal) added.

    less: (n, n), symmetric, of any floating type, which is subtracted from the matrix first; order: (n,) int64, a
    permutation of its rows and columns. Both happen on the way into the one copy that is factorised in place. The
    damping grows tenfold until the factorisation succeeds, so that rank-deficient moments (fewer tokens than features,
    dead channels) are factorised too. Raises NumericalError if the matrix is not finite.
    """
    diagonal = matrix.diagonal() if less is None else matrix.diagonal() - less.diagonal()
    mean = diagonal.mean()
    if not torch.isfinite(mean):
        raise NumericalError(
            "the second moments of the activations are not finite",
            "Check the checkpoint's weights, or leave out the sample that causes it.",
        )
    # Raise the damping until the matrix is positive definite.
    scale = float(mean) or 1.0
    factor = torch.empty_like(matrix).mT  # column-major, as LAPACK wants it: factorised without a second copy
    while True:
        _copy(matrix, less, order, factor.mT)
        factor.diagonal().add_(damping * scale)
        failed = torch.empty((), dtype=torch.int32)
        torch.linalg.cholesky_ex(factor, out=(factor, failed))
        if not failed:
            return factor
        damping = max(damping * 10, 1e-12)


def _copy(matrix: torch.Tensor, less: torch.Tensor | None, order: torch.Tensor | None, target: torch.Tensor) -> None:
    """Writes the matrix, less the other, in this order of rows and columns into the target (n, n)."""
    for start in range(0, len(matrix), ROWS):
        rows = slice(start, start + ROWS) if order is None else order[start : start + ROWS]
        part = matrix[rows] if less is None else matrix[rows] - less[rows]
        target[start : start + ROWS] = part if order is None else part[:, order]


def solved(factor: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Returns the solution X (n, m) of L L^T X = right (n, m) for the lower factor L (n, n), in the place of the right.

    Unlike torch.cholesky_solve it makes no copy of the factor.
    """
    torch.linalg.solve_triangular(factor, right, upper=False, out=right)
    return torch.linalg.solve_triangular(factor.mT, right, upper=True, out=right)
