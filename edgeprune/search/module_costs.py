"""The cost of a Decoder by module: the one table that engines fill and the allocation reads.

Plain numbers; it does not know how they were obtained, nor what they limit. The formats that a table speaks of are
those of its problem, by their place in that list; the first one are floats.
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


FLOATS = (0, 0)  # the formats of a layer's attention and MLP, or of embedding and head


@dataclass(frozen=True)
class ModuleCosts:
    """One cost, in bytes or ms: a sum over the modules, and a peak that the largest module alone decides.

    attention: (formats, num_key_value_heads + 1, heads_per_group), at [f, g, r - 1] for g kept groups of r query heads,
    0 at g = 0; mlp: (formats, intermediate_size + 1), at [f, k] for k kept channels, 0 at k = 0; attention_peak,
    mlp_peak: the same without formats; tables: (formats, formats, 2), at [e, h] the cost of a model without layers
    whose embedding and head have these formats: a fixed part, and a part for each token of the vocabulary. A width or a
    pair of tables that cannot have a format costs inf.
    """

    attention: np.ndarray
    mlp: np.ndarray
    attention_peak: np.ndarray
    mlp_peak: np.ndarray
    tables: np.ndarray

    def base(self, vocab_size: int, tables: tuple[int, int] = FLOATS) -> float:
        """Returns the cost of a model without layers."""
        fixed, token = self.tables[tables]
        return float(fixed + token * vocab_size)

    def total(
        self,
        layers: Sequence[Widths],
        vocab_size: int,
        formats: Sequence[tuple[int, int]] | None = None,
        tables: tuple[int, int] = FLOATS,
    ) -> float:
        """Returns the cost of a model whose layers have these widths; 0 heads or channels: the module is gone.

        formats: of each layer's attention and MLP; None: floats.
        """
        groups, heads, channels = np.array(layers).T  # (layers,) each
        of_attention, of_mlp = np.array(formats or [FLOATS] * len(layers)).T  # (layers,) each
        attention, mlp = self.attention[of_attention, groups, heads - 1], self.mlp[of_mlp, channels]
        peak = max(self.attention_peak[groups, heads - 1].max(), self.mlp_peak[channels].max())
        return float(self.base(vocab_size, tables) + attention.sum() + mlp.sum() + peak)


def additive(attention: np.ndarray, mlp: np.ndarray, tables: np.ndarray | None = None) -> ModuleCosts:
    """Returns a cost without peaks; the arrays have the shapes of ModuleCosts. tables: by default nothing."""
    formats = len(attention)
    if tables is None:
        tables = np.zeros((formats, formats, 2))
    return ModuleCosts(attention, mlp, np.zeros_like(attention[0]), np.zeros_like(mlp[0]), tables)


def channel_options(size: int, multiple: int) -> list[int]:
    """Returns the widths that an MLP of `size` channels may have: the multiples below `size`, and `size` itself."""
    return sorted({*range(multiple, size, multiple), size})
