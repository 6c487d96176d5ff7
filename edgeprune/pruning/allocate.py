"""Which widths to keep: errors of every possible cut in closed form, and the best one within limits.

Pure: arrays in, arrays out; it sees no model. Layout `uniform`: the same widths in every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from edgeprune.pruning.score import cholesky

MOMENT_DAMPING = 1e-2
"""Added to the moments as a share of their mean diagonal: few samples know few directions."""


class Widths(NamedTuple):
    """The widths of one layer."""

    num_key_value_heads: int
    heads_per_group: int
    intermediate_size: int


@dataclass(frozen=True)
class Sensitivities:
    """Relative error that each cut would leave after compensation, by layer, on the dense stream.

    attention: (layers, num_key_value_heads, heads_per_group) fp64, at [l, g - 1, r - 1] for g kept
    groups of r query heads; mlp: (layers, intermediate_size + 1) fp64, at [l, k] for k kept channels.
    An error is sum_t ||dy_t||^2 / ||h_t||^2 / tokens, with dy_t the change of the module's output and
    h_t the residual stream that it is added to: the next norm sees the stream relative to its length.
    response: nats per token that the loss rises per unit of error summed over the layers, for removed
    groups, removed query heads and removed channels; measured, because the errors of different kinds
    of cuts are not worth the same.
    """

    attention: np.ndarray
    mlp: np.ndarray
    response: np.ndarray = field(default_factory=lambda: np.ones(3))

    def uniform_errors(self, widths: Widths) -> np.ndarray:
        """Summed errors (3,) of the removed groups, query heads and channels, for the same widths everywhere."""
        groups = float(self.attention[:, widths.num_key_value_heads - 1, -1].sum())
        both = float(self.attention[:, widths.num_key_value_heads - 1, widths.heads_per_group - 1].sum())
        return np.array([groups, both - groups, self.mlp[:, widths.intermediate_size].sum()])

    def uniform_loss(self, widths: Widths) -> float:
        """Predicted rise of the loss in nats per token when every layer is cut to these widths."""
        return float(self.response @ self.uniform_errors(widths))


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


def uniform_options(dense: Widths, multiple: int) -> list[Widths]:
    """All widths of the uniform layout, the dense one included: `multiple` is that of the MLP channels."""
    channels = sorted({*range(multiple, dense.intermediate_size, multiple), dense.intermediate_size})
    return [
        Widths(groups, heads, size)
        for groups in range(1, dense.num_key_value_heads + 1)
        for heads in range(1, dense.heads_per_group + 1)
        for size in channels
    ]


def best_within(
    options: Sequence[Widths], error: Callable[[Widths], float], fits: Callable[[Widths], bool]
) -> Widths | None:
    """The option of the least error among those that fit; None where none does."""
    return min(filter(fits, options), key=error, default=None)
