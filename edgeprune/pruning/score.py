"""Scores of the units of an output projection: which heads or channels matter.

Pure: arrays in, arrays out. A unit is `unit` adjacent input features of the projection: one channel
(1), one head (head_dim) or one key/value group (heads_per_group * head_dim). Larger is more important.
Every score has the signature of `Score`; it returns (in_features / unit,) fp64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from edgeprune.pruning.linear import cholesky
from edgeprune.pruning.obs import greedy_order
from edgeprune.pruning.relaxation import box_constrained, interaction, unconstrained

BOX_PENALTY = 100.0  # of the sum constraint, in units of 1 / (1^T A^-1 1): the sum is met within a percent
OBS_DAMPING = 1e-2
OBS_BATCHES = 16


@dataclass(frozen=True)
class Projection:
    """An output projection y = X W^T and what its inputs look like: all that a score sees.

    weight: (out_features, in_features) fp32; gram: (in_features, in_features) fp64, X^T X;
    inputs: (samples, tokens, in_features) fp32, X; generator: for what is drawn.
    """

    weight: torch.Tensor
    gram: torch.Tensor
    inputs: torch.Tensor
    generator: torch.Generator

    @property
    def mean(self) -> torch.Tensor:
        """Mean input (in_features,) fp64."""
        return self.inputs.mean(dim=(0, 1), dtype=torch.float64)

    @property
    def variance(self) -> torch.Tensor:
        """Variance of each input (in_features,) fp64."""
        tokens = self.inputs.shape[0] * self.inputs.shape[1]
        return (self.gram.diagonal() / tokens - self.mean.square()).clamp_min(0.0)

    def units(self, unit: int) -> int:
        return self.weight.shape[1] // unit


Score = Callable[[Projection, int, int], torch.Tensor]  # projection, features of a unit, units to keep


def numerical(projection: Projection, unit: int, keep: int) -> torch.Tensor:
    """The numerical score in closed form (Shen et al. 2025, arXiv 2412.12441, eq. 3).

    The relaxed mask z minimises 1/2 ||X W - X (z o W)||^2 + lambda/2 (<1, z> - r)^2. With
    A = (W W^T) o G, summed over the features of each unit, the optimum is z = 1 - c u with
    u = A^-1 1 and c > 0 whatever lambda and r are, so that the ranking within a module is -u.
    Raises NumericalError if gram is not finite.
    """
    return -unconstrained(interaction(projection.weight, projection.gram, unit))


def numerical_box(projection: Projection, unit: int, keep: int) -> torch.Tensor:
    """The numerical score with its box 0 <= z <= 1 kept (Shen et al. 2025, eq. 3), by projected Newton.

    Units at a bound are ranked by their multiplier: how hard the objective pushes them against it.
    """
    matrix = interaction(projection.weight, projection.gram, unit)
    z, gradient = box_constrained(matrix, float(keep), BOX_PENALTY)
    return z - gradient


def obs(projection: Projection, unit: int, keep: int) -> torch.Tensor:
    """Optimal Brain Surgeon for groups: what a removal costs when the kept weights are refitted.

    1/2 tr(W_g^T [(G^-1)_gg]^-1 W_g) for unit g (Hassibi and Stork 1993; for groups Kurtic et al. 2022,
    arXiv 2203.07259). Greedy: the least important units go in batches of 1/16 of all, each followed by
    the downdate of G^-1 and W. A unit that goes earlier ranks lower.
    """
    batch = max(1, projection.units(unit) // OBS_BATCHES)
    inverse = cholesky(projection.gram, OBS_DAMPING)
    torch.cholesky_inverse(inverse, out=inverse)
    return greedy_order(projection.weight.T.contiguous().double(), inverse, unit, keep, batch)


def magnitude(projection: Projection, unit: int, keep: int) -> torch.Tensor:
    """Norm of the projection's weights that read the unit: ||W_j||."""
    return projection.weight.double().square().sum(dim=0).view(-1, unit).sum(dim=1).sqrt()


def wanda(projection: Projection, unit: int, keep: int) -> torch.Tensor:
    """Wanda-sp: (sum_j ||W_j||^2 ||X_j||^2)^1/2 over the unit (Sun et al. 2024, arXiv 2306.11695, its
    structured form as in An et al. 2024, arXiv 2312.11983)."""
    energy = projection.weight.double().square().sum(dim=0) * projection.gram.diagonal()
    return energy.view(-1, unit).sum(dim=1).sqrt()


def flap(projection: Projection, unit: int, keep: int) -> torch.Tensor:
    """FLAP's fluctuation metric Var(X_j) ||W_j||^2 (An et al. 2024, arXiv 2312.11983), standardised over
    the module, so that values of different modules compare. The attention's is squared first, as in the
    authors' program, and averaged over each head or group."""
    metric = projection.variance * projection.weight.double().square().sum(dim=0)
    if unit > 1:
        metric = metric.square()
    deviation = metric.std().clamp_min(torch.finfo(torch.float64).tiny)
    return ((metric - metric.mean()) / deviation).view(-1, unit).mean(dim=1)


def random(projection: Projection, unit: int, keep: int) -> torch.Tensor:
    """A seeded random order: what any score has to beat."""
    return torch.rand(projection.units(unit), dtype=torch.float64, generator=projection.generator)
