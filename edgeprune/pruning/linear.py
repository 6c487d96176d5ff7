"""Factorisations of second moments that never fail on finite input, however few the samples.

Pure: arrays in, arrays out; it does not know which equations are solved with a factor.
"""

from __future__ import annotations

import torch

from edgeprune.errors import NumericalError


def cholesky(matrix: torch.Tensor, damping: float) -> torch.Tensor:
    """Returns the lower Cholesky factor of a symmetric matrix (n, n) fp64 with damping * mean(diagonal) added.

    The damping grows tenfold until the factorisation succeeds, so that rank-deficient moments
    (fewer tokens than features, dead channels) are factorised too. Raises NumericalError if the
    matrix is not finite.
    """
    diagonal = matrix.diagonal()
    mean = diagonal.mean()
    if not torch.isfinite(mean):
        raise NumericalError(
            "the second moments of the activations are not finite",
            "Check the checkpoint's weights, or leave out the sample that causes it.",
        )
    # Raise the damping until the matrix is positive definite.
    scale = float(mean) or 1.0
    while True:
        factor = matrix.clone().mT  # column-major, as LAPACK wants it: factorised in place, without a second copy
        factor.diagonal().add_(damping * scale)
        failed = torch.empty((), dtype=torch.int32)
        torch.linalg.cholesky_ex(factor, out=(factor, failed))
        if not failed:
            return factor
        damping = max(damping * 10, 1e-12)
