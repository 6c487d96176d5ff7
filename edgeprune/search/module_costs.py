"""The cost of a Decoder by module: the one table that engines fill and the allocation reads.

Plain numbers; it does not know how they were obtained, nor what they limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Widths(NamedTuple):
    """The widths of one layer; 0 key/value heads: it has no attention; intermediate size 0: it has no MLP."""

    num_key_value_heads: int
    heads_per_group: int
    intermediate_size: int


@dataclass(frozen=True)
class ModuleCosts:
    """One cost, in bytes or ms: a sum over the modules, and a peak that the largest module alone decides.

    attention, attention_peak: (num_key_value_heads + 1, heads_per_group), at [g, r - 1] for g kept groups of r query
    heads, 0 at g = 0; mlp, mlp_peak: (intermediate_size + 1,), at [k] for k kept channels, 0 at k = 0; fixed: the
    cost of a model without layers and tokens; token: the cost of each token of the vocabulary.
    """

    attention: np.ndarray
    mlp: np.ndarray
    attention_peak: np.ndarray
    mlp_peak: np.ndarray
    fixed: float
    token: float

    def base(self, vocab_size: int) -> float:
        """Returns the cost of a model without layers."""
        return self.fixed + self.token * vocab_size

    def total(self, layers: Sequence[Widths], vocab_size: int) -> float:
        """Returns the cost of a model whose layers have these widths; 0 heads or channels: the module is gone."""
        groups, heads, channels = np.array(layers).T  # (layers,) each
        attention, mlp = self.attention[groups, heads - 1], self.mlp[channels]
        peak = max(self.attention_peak[groups, heads - 1].max(), self.mlp_peak[channels].max())
        return float(self.base(vocab_size) + attention.sum() + mlp.sum() + peak)


def additive(attention: np.ndarray, mlp: np.ndarray, fixed: float = 0.0, token: float = 0.0) -> ModuleCosts:
    """Returns a cost without peaks; the tables have the shapes of ModuleCosts."""
    return ModuleCosts(attention, mlp, np.zeros_like(attention), np.zeros_like(mlp), fixed, token)


def channel_options(size: int, multiple: int) -> list[int]:
    """Returns the widths that an MLP of `size` channels may have: the multiples below `size`, and `size` itself."""
    return sorted({*range(multiple, size, multiple), size})
