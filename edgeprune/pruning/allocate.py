"""Which widths to keep: what every possible cut costs, and the best one within limits.

Pure: numbers in, numbers out; it sees no model. Layout `uniform`: the same widths in every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np


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
