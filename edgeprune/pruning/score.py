"""Scores of the units of an output projection: which heads or channels matter.

Pure: arrays in, arrays out. A unit is `unit` adjacent input features of the projection: one channel
(1), one head (head_dim) or one key/value group (heads_per_group * head_dim). Larger is more important.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from edgeprune.errors import NumericalError

Score = Callable[[torch.Tensor, torch.Tensor, int, torch.Generator], torch.Tensor]


def cholesky(matrix: torch.Tensor, damping: float) -> torch.Tensor:
    """Lower Cholesky factor of a symmetric fp64 matrix with damping * mean(diagonal) added.

    The damping grows tenfold until the factorisation succeeds, so that rank-deficient moments
    (fewer tokens than features, dead channels) are solved too. Raises NumericalError if the
    matrix is not finite.
    """
    diagonal = matrix.diagonal()
    mean = diagonal.mean()
    if not torch.isfinite(mean):
        raise NumericalError(
            "the second moments of the activations are not finite",
            "Check the checkpoint's weights, or leave out the sample that causes it.",
        )
    scale = float(mean) or 1.0
    while True:
        damped = matrix.clone()
        damped.diagonal().add_(damping * scale)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            return factor
        damping = max(damping * 10, 1e-12)


def numerical(weight: torch.Tensor, gram: torch.Tensor, unit: int, generator: torch.Generator) -> torch.Tensor:
    """The numerical score in closed form (Shen et al. 2025, arXiv 2412.12441, eq. 3).

    The relaxed mask z minimises 1/2 ||X W - X (z o W)||^2 + lambda/2 (<1, z> - r)^2. With
    A = (W W^T) o G, summed over the features of each unit, the optimum is z = 1 - c u with
    u = A^-1 1 and c > 0 whatever lambda and r are, so that the ranking within a module is -u.

    weight: (out_features, in_features) fp32; gram: (in_features, in_features) fp64, X^T X.
    Returns (in_features / unit,) fp64. Raises NumericalError if gram is not finite.
    """
    interaction = (weight.T @ weight).double() * gram
    units = len(gram) // unit
    if unit > 1:
        interaction = interaction.view(units, unit, units, unit).sum(dim=(1, 3))
    factor = cholesky(interaction, 1e-6)
    ones = torch.ones(units, 1, dtype=torch.float64)
    return -torch.cholesky_solve(ones, factor).squeeze(1)


def magnitude(weight: torch.Tensor, gram: torch.Tensor, unit: int, generator: torch.Generator) -> torch.Tensor:
    """Norm of the projection's weights that read the unit: ||W_j||. Arguments as in `numerical`."""
    return weight.double().square().sum(dim=0).view(-1, unit).sum(dim=1).sqrt()


def random(weight: torch.Tensor, gram: torch.Tensor, unit: int, generator: torch.Generator) -> torch.Tensor:
    """A seeded random order: what any score has to beat. Arguments as in `numerical`."""
    return torch.rand(len(gram) // unit, dtype=torch.float64, generator=generator)
