"""Scores of the units of an output projection: how much each head or channel matters.

Pure: arrays in, arrays out; it does not know which module a projection belongs to. A unit is `unit` adjacent
input features of the projection: one channel (1), one head (head_dim) or one key/value group
(heads_per_group * head_dim). A larger score is more important. Every score has the signature of `Score`; it
returns (in_features / unit,) fp64.
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
    """An output projection y = X W^T with the inputs of the calibration samples: all that a score uses.

    weight: (out_features, in_features) fp32, W; gram: (in_features, in_features) fp64, X^T X;
    inputs: (samples, tokens, in_features) fp32, X; generator: the source of random numbers.
    """

    weight: torch.Tensor
    gram: torch.Tensor
    inputs: torch.Tensor
    generator: torch.Generator

    @property
    def mean(self) -> torch.Tensor:
        """Returns the mean of each input feature (in_features,) fp64."""
        return self.inputs.mean(dim=(0, 1), dtype=torch.float64)

    @property
    def variance(self) -> torch.Tensor:
        """Returns the variance of each input feature (in_features,) fp64."""
        tokens = self.inputs.shape[0] * self.inputs.shape[1]
        return (self.gram.diagonal() / tokens - self.mean.square()).clamp_min(0.0)

    @property
    def running_variance(self) -> torch.Tensor:
        """Returns the variance of each input feature, (in_features,) fp64, up to a factor, as FLAP's program runs it.

        It reads a sample at a time: with S_k the squares of sample k around the mean m_k of the first k samples, the
        result is sum_{k>1} (k - 1) / k S_k, so that the first sample moves the means alone (`BiasGPT.add_batch` in
        github.com/CASIA-IVA-Lab/FLAP). Of a single sample it is the variance.
        """
        if len(self.inputs) == 1:
            return self.variance
        mean = torch.zeros(self.inputs.shape[-1], dtype=torch.float64)
        total = torch.zeros_like(mean)
        for count, sample in enumerate(self.inputs, start=1):  # (tokens, in_features)
            mean += (sample.mean(dim=0, dtype=torch.float64) - mean) / count
            total += (sample - mean).square().sum(dim=0) * ((count - 1) / count)
        return total

    def units(self, unit: int) -> int:
        """Returns how many units of `unit` features the projection has."""
        return self.weight.shape[1] // unit


Score = Callable[[Projection, int, int], torch.Tensor]  # projection, features of a unit, units to keep


def numerical(projection: Projection, unit: int, keep: int) -> torch.Tensor:
    """Returns the numerical score in closed form (Shen et al. 2025, arXiv 2412.12441, eq. 3).

    The relaxed mask z minimises 1/2 ||X W - X (z o W)||^2 + lambda/2 (<1, z> - r)^2. With
    A = (W W^T) o G, summed over the features of each unit, the optimum is z = 1 - c u with u = A^-1 1
    and some c > 0. The constant c depends on lambda and r, the order of the units does not: they are
    ranked by -u. Raises NumericalError if gram is not finite.
    """
    return -unconstrained(interaction(projection.weight, projection.gram, unit))


def numerical_box(projection: Projection, unit: int, keep: int) -> torch.Tensor:
    """Returns the numerical score under its bounds 0 <= z <= 1 (Shen et al. 2025, eq. 3), by projected Newton.

    Units at a bound are ranked by their multiplier: how hard the objective pushes them against it.
    Raises NumericalError if gram is not finite.
    """
    z, gradient = box_constrained(interaction(projection.weight, projection.gram, unit), float(keep), BOX_PENALTY)
    return z - gradient


def obs(projection: Projection, unit: int, keep: int) -> torch.Tensor:
    """Returns the score of Optimal Brain Surgeon: the cost of a removal when the kept weights are refitted.

    The cost of unit g is 1/2 tr(W_g^T [(G^-1)_gg]^-1 W_g) (Hassibi and Stork 1993; for groups of weights
    Kurtic et al. 2022, arXiv 2203.07259). The order is greedy: the least important units are removed in
    batches of 1/16 of all, and W and G^-1 are downdated after each batch. A unit that is removed earlier
    ranks lower. Raises NumericalError if gram is not finite.
    """
    batch = max(1, projection.units(unit) // OBS_BATCHES)
    inverse = cholesky(projection.gram, OBS_DAMPING)  # (in_features, in_features)
    torch.cholesky_inverse(inverse, out=inverse)
    return greedy_order(projection.weight.T.contiguous().double(), inverse, unit, keep, batch)


def magnitude(projection: Projection, unit: int, keep: int) -> torch.Tensor:
    """Returns the norm ||W_j|| of the projection's weights that read each unit."""
    return projection.weight.double().square().sum(dim=0).view(-1, unit).sum(dim=1).sqrt()


def wanda(projection: Projection, unit: int, keep: int) -> torch.Tensor:
    """Returns the score of Wanda-sp: (sum_j ||W_j||^2 ||X_j||^2)^1/2 over the features j of each unit.

    The metric is by Sun et al. 2024 (arXiv 2306.11695), its structured form by An et al. 2024 (arXiv 2312.11983).
    """
    energy = projection.weight.double().square().sum(dim=0) * projection.gram.diagonal()  # (in_features,)
    return energy.view(-1, unit).sum(dim=1).sqrt()


def fluctuation(projection: Projection, unit: int, keep: int) -> torch.Tensor:
    """Returns FLAP's fluctuation metric Var(X_j) ||W_j||^2 (An et al. 2024, arXiv 2312.11983), standardised."""
    return _standardised(projection.variance, projection, unit)


def flap(projection: Projection, unit: int, keep: int) -> torch.Tensor:
    """Returns the fluctuation metric as FLAP's program has it, with its running estimate of the variance."""
    return _standardised(projection.running_variance, projection, unit)


def _standardised(variance: torch.Tensor, projection: Projection, unit: int) -> torch.Tensor:
    """Returns the fluctuation metric of each unit, standardised over the module: modules compare.

    The metric of an attention is squared first, as in the authors' program, and the standardised values are averaged
    over each head or group.
    """
    metric = variance * projection.weight.double().square().sum(dim=0)  # (in_features,)
    if unit > 1:
        metric = metric.square()
    deviation = metric.std().clamp_min(torch.finfo(torch.float64).tiny)
    return ((metric - metric.mean()) / deviation).view(-1, unit).mean(dim=1)


def random(projection: Projection, unit: int, keep: int) -> torch.Tensor:
    """Returns random scores from the projection's generator: the baseline that any score has to beat."""
    return torch.rand(projection.units(unit), dtype=torch.float64, generator=projection.generator)
